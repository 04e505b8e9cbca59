"""What a run trains: a LoRA adapter, a tree of them or all weights, put on the base, and how the result is saved.

Training scripts take one of these and give it to `training.train`; the loop does not know which it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightning.fabric import Fabric

from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.command_line import progress
from lit_llama.config import Embeddings, Quantization
from lit_llama.errors import InputError
from lit_llama.lora import LoRAConfig, inject_lora, load_adapter, lora_layers, save_adapter, stack_lora, trained_summary
from lit_llama.lora_tree import LoRATreeConfig, inject_lora_tree, tree_summary
from lit_llama.merging import write_merged_checkpoint
from lit_llama.model import Llama
from lit_llama.parallel import loading_device
from lit_llama.prompts import detect_style, write_chat_template
from lit_llama.training import RunArguments, TrainingArguments

Save = Callable[[Path], None]
"""Writes what has been trained into a directory."""


@dataclass(kw_only=True)
class LoRARunArguments(RunArguments):
    """Train a LoRA adapter, whatever on."""

    lora: LoRAConfig = field(default_factory=LoRAConfig)
    quantize: Quantization | None = None
    """Keep the frozen base in 4 bits (nf4, nf4-dq, int4) or 8 bits (int8)."""
    embeddings: Embeddings | None = None
    """Embedding and head in 8 bits (int8), or the embedding in the host's memory (cpu)."""
    start_adapter: Path | None = None
    """Begin on top of this adapter of the base, from pretraining for instance."""
    start_mode: Literal["stack", "continue", "merge"] = "stack"
    """What becomes of start_adapter. stack: it stays frozen below the new one, and both are saved as one adapter of the
    base. continue: it is trained further, with its own rank and targets. merge: base and adapter become one checkpoint,
    merged_dir, which is the base of the new adapter."""
    merged_dir: Path | None = None
    """Where start_mode merge writes the merged base; one that is there is used again."""


@dataclass(kw_only=True)
class LoRAArguments(LoRARunArguments, TrainingArguments):
    """Train a LoRA adapter; out_dir becomes a PEFT adapter directory."""


@dataclass(kw_only=True)
class LoRATreeArguments(TrainingArguments):
    """Train a tree of LoRA adapters; out_dir becomes an adapter directory."""

    lora_tree: LoRATreeConfig = field(default_factory=LoRATreeConfig)
    quantize: Quantization | None = None
    """Keep the frozen base in 4 bits (nf4, nf4-dq, int4) or 8 bits (int8)."""
    embeddings: Embeddings | None = None
    """Embedding and head in 8 bits (int8), or the embedding in the host's memory (cpu)."""


def lora_learner(fabric: Fabric, arguments: LoRARunArguments) -> tuple[Llama, Save]:
    """The base with a new adapter on it; with start_mode merge, `arguments.checkpoint_dir` becomes the merged base.

    Raises:
        InputError: arguments that contradict each other, or an adapter that does not fit.
    """
    start, mode = arguments.start_adapter, arguments.start_mode
    if start is not None and mode == "merge":
        if arguments.merged_dir is None:
            raise InputError("start_mode merge needs --merged_dir, where the merged base is written")
        if fabric.is_global_zero and not (arguments.merged_dir / "config.json").is_file():
            write_merged_checkpoint(arguments.checkpoint_dir, start, arguments.merged_dir)
        fabric.barrier()
        arguments.checkpoint_dir = arguments.merged_dir
    device = loading_device(fabric, arguments.quantize)
    model = load_model(arguments.checkpoint_dir, arguments.dtype, device, arguments.quantize, arguments.embeddings)
    if start is None or mode == "merge":
        inject_lora(model, arguments.lora)
    elif mode == "stack":
        stack_lora(model, arguments.lora, start)
    else:
        load_adapter(model, start)
        if not any(True for _ in lora_layers(model)):
            raise InputError(f"{start} is not a LoRA adapter, which alone can be trained further")
        arguments.lora = model.lora_config
    if fabric.is_global_zero:
        progress(trained_summary(model))
    return model, lambda directory: save_adapter(model, directory, base_model=str(arguments.checkpoint_dir))


def lora_tree_learner(fabric: Fabric, arguments: RunArguments) -> tuple[Llama, Save]:
    """The base with a new tree of adapters on it, by `arguments.lora_tree`.

    Raises:
        InputError: `start_adapter`, which trees cannot be put on, or layers to be compiled.
    """
    if getattr(arguments, "start_adapter", None) is not None:
        raise InputError("a tree begins on a plain base: merge start_adapter into it first (scripts/merge_lora.py)")
    if arguments.train.compile:
        raise InputError("train.compile does not go with a tree of adapters: leave it out")
    device = loading_device(fabric, arguments.quantize)
    model = load_model(arguments.checkpoint_dir, arguments.dtype, device, arguments.quantize, arguments.embeddings)
    inject_lora_tree(model, arguments.lora_tree)
    if fabric.is_global_zero:
        progress(trained_summary(model) if arguments.lora_tree.depth == 0 else tree_summary(model))
    return model, lambda directory: save_adapter(model, directory, base_model=str(arguments.checkpoint_dir))


def full_learner(fabric: Fabric, arguments: RunArguments) -> tuple[Llama, Save]:
    """The base with all weights to be trained; saved as a checkpoint, `checkpoint/` in the run's directory.

    Where the training data have another prompt style than the base, or a system message, it gets a chat template of it.
    """
    model = load_model(arguments.checkpoint_dir, arguments.dtype, loading_device(fabric))
    model.requires_grad_(True)

    def save(directory: Path) -> None:
        target = directory / "checkpoint"
        save_checkpoint(model, target, tokenizer_from=arguments.checkpoint_dir, overwrite=True)
        style, system = arguments.eval.probe_style, arguments.eval.probe_system
        if style is not None and (system is not None or style != detect_style(arguments.checkpoint_dir)):
            write_chat_template(target, style, system)

    return model, save
