"""Turn a small Llama into a sub-domain expert on one consumer GPU, and know whether it worked.

The names below are the stable Python API. They are imported when first used, so that a worker process that only
tokenizes does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_llama.checkpoint import load_model, save_checkpoint
    from lit_llama.config import LlamaConfig
    from lit_llama.generation import generate
    from lit_llama.lora import LoRAConfig, inject_lora, load_adapter, merge_lora, save_adapter
    from lit_llama.lora_tree import LoRATreeConfig, inject_lora_tree
    from lit_llama.loss import linear_cross_entropy
    from lit_llama.model import Llama
    from lit_llama.tokenizer import Tokenizer

__all__ = [
    "Llama",
    "LlamaConfig",
    "LoRAConfig",
    "LoRATreeConfig",
    "Tokenizer",
    "generate",
    "inject_lora",
    "inject_lora_tree",
    "linear_cross_entropy",
    "load_adapter",
    "load_model",
    "merge_lora",
    "save_adapter",
    "save_checkpoint",
]

_HOME = {
    "checkpoint": ("load_model", "save_checkpoint"),
    "config": ("LlamaConfig",),
    "generation": ("generate",),
    "lora": ("LoRAConfig", "inject_lora", "load_adapter", "merge_lora", "save_adapter"),
    "lora_tree": ("LoRATreeConfig", "inject_lora_tree"),
    "loss": ("linear_cross_entropy",),
    "model": ("Llama",),
    "tokenizer": ("Tokenizer",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
