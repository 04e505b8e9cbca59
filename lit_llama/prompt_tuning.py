"""Learned keys and values in attention: prefix tuning and LLaMA-Adapter, as modules in the place of `Attention.attend`.

    prefix tuning (Li & Liang 2021, arXiv 2101.00190)
        n keys and values in front of every document, in each layer; one softmax over them and the document's own
    LLaMA-Adapter, version 1 (Zhang et al. 2023, arXiv 2303.16199)
        in the top layers a prompt of its own, seen through the layer's k_proj and v_proj, with a softmax of its own:
        attention + gate * softmax(q k_prompt^T / sqrt(head_dim)) v_prompt, the gate zero at first
    version 2 (Gao et al. 2023, arXiv 2304.15010)
        version 1, a bias and a scale on every linear layer of the decoder, scale * (W x + bias), and trained norms

Prefixes and version 1 are stored as PEFT stores them (PREFIX_TUNING, ADAPTION_PROMPT), so that
`peft.PeftModel.from_pretrained(base, adapter_dir)` opens one and PEFT's open here. PEFT knows no version 2: it is kept
as LLAMA_ADAPTER_V2 with a schema version. The products of attention are `functional.py`; LoRA is `lora.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.adapter_files import PEFT_PREFIX, fill_parameters, read_adapter_state, write_adapter
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.files import read_json
from lit_llama.functional import CausalMask, attention, rotate
from lit_llama.kv_cache import KVCache
from lit_llama.model import Attention, Llama
from lit_llama.quantization import QuantizedLinear

_PEFT_TYPES = {"PREFIX_TUNING": None, "ADAPTION_PROMPT": 1, "LLAMA_ADAPTER_V2": 2}
"""Kinds of adapter directories and the version of LLaMA-Adapter in them."""

_SCHEMA_VERSION = 1
"""Of LLAMA_ADAPTER_V2."""


@dataclass
class PrefixConfig:
    """A prefix of learned keys and values."""

    num_virtual_tokens: int = 16
    """Length of the prefix, in every layer."""
    init: Literal["tokens", "random"] = "tokens"
    """Where it starts: at the keys and values of real tokens, as if these stood before every document, which learns
    faster and ends better (section 7.4 of the paper); or at random."""
    init_text: str | None = None
    """The text of these tokens, best one that fits the task; repeated if it is too short. None: the beginning of the
    training data."""

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise InputError(f"prefix.num_virtual_tokens {self.num_virtual_tokens} must be at least 1")
        if self.init not in ("tokens", "random"):
            raise InputError(f"prefix.init {self.init!r} is not one of tokens, random")


@dataclass
class LlamaAdapterConfig:
    """LLaMA-Adapter."""

    version: Literal[1, 2] = 1
    """1: gated prompts; 2: also a bias and a scale on every linear layer, and trained norms."""
    adapter_length: int = 10
    """Length of each layer's prompt."""
    layers: int | None = None
    """How many layers have one, counted from the top. None: all but the lowest two, at least one."""

    def __post_init__(self) -> None:
        if self.version not in (1, 2):
            raise InputError(f"adapter.version {self.version} is neither 1 nor 2")
        if self.adapter_length < 1:
            raise InputError(f"adapter.adapter_length {self.adapter_length} must be at least 1")

    def adapted_layers(self, config: LlamaConfig) -> range:
        """Numbers of the layers that have a prompt."""
        top = config.num_hidden_layers
        count = max(1, top - 2) if self.layers is None else self.layers
        if not 1 <= count <= top:
            raise InputError(f"adapter.layers {count} is not from 1 to {top}, the layers that this model has")
        return range(top - count, top)


class Prefix(nn.Module):
    """Attention with learned keys and values that every query sees besides its document's.

    PEFT puts them into the cache as tokens 0..n-1, unrotated, and so moves the document's positions by n. Here the
    document stays, and keys are rotated by -n: a score depends only on the difference of the two.
    """

    def __init__(self, prefix: Tensor, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.prefix = nn.Parameter(prefix)
        """(2, kv_heads, n, head_dim) fp32: keys and values as PEFT has them."""
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: CausalMask | Tensor | None) -> Tensor:
        front_key, front_value = self.prefix.unbind()
        front_key = rotate(front_key[None], self.cos, self.sin)[0]
        return attention(query, key, value, mask, (front_key.to(query.dtype), front_value.to(query.dtype)))


class GatedPrompt(nn.Module):
    """Attention and, times a gate, attention to a learned prompt; names and shapes of the parameters are PEFT's."""

    def __init__(self, layer: Attention, length: int, device: torch.device) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, or it would be a child of its own child
        self.adaption_prompt = nn.Parameter(torch.randn(1, length, layer.k_proj.in_features, device=device))
        self.adaption_gate = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: CausalMask | Tensor | None) -> Tensor:
        (layer,) = self._layer
        mixed = attention(query, key, value, mask)
        batch, _, _, head_dim = query.shape
        prompt = self.adaption_prompt.to(query.dtype)
        keys, values = (
            projection(prompt).view(-1, key.shape[1], head_dim).transpose(0, 1).expand(batch, -1, -1, -1)
            for projection in (layer.k_proj, layer.v_proj)
        )  # (batch, kv_heads, prompt, head_dim)
        grouped = query.reshape(batch, key.shape[1], -1, head_dim)  # heads of a group take the place of queries
        prompted = F.scaled_dot_product_attention(grouped, keys, values).view(query.shape)
        return torch.addcmul(mixed, prompted, self.adaption_gate.to(query.dtype))


class ScaledLinear(nn.Module):
    """A frozen linear layer, perhaps quantized, with a learned bias and scale (out,), fp32: scale * (W x + bias)."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        device = next(iter(linear.state_dict().values())).device
        self.adapter_scale = nn.Parameter(torch.ones(linear.out_features, device=device))
        self.adapter_bias = nn.Parameter(torch.zeros(linear.out_features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        bias = (self.adapter_scale * self.adapter_bias).to(x.dtype)
        return torch.addcmul(bias, self.linear(x), self.adapter_scale.to(x.dtype))


def inject_prefix(model: Llama, config: PrefixConfig, token_ids: Sequence[int] = ()) -> None:
    """Freeze the model and give every layer a prefix, in place: the only parameters that require a gradient.

    Args:
        token_ids: what the prefix starts as, for `init` "tokens"; repeated or cut to its length.

    Raises:
        InputError: the model has an adapter already, or there are no tokens to start from.
    """
    _freeze(model)
    shape = (2, model.config.num_key_value_heads, config.num_virtual_tokens, model.config.head_dim)
    device = model.model.norm.weight.device
    if config.init == "random":
        prefixes = [torch.randn(shape, device=device) for _ in model.model.layers]
    else:
        if not len(token_ids):
            raise InputError("prefix.init tokens has no tokens to start from; give prefix.init_text")
        prefixes = _keys_and_values(model, [token_ids[i % len(token_ids)] for i in range(config.num_virtual_tokens)])
    _set_prefixes(model, config, prefixes)


@torch.no_grad()
def _keys_and_values(model: Llama, token_ids: list[int]) -> list[Tensor]:
    """What the cache holds after these tokens, fp32 (2, kv_heads, tokens, head_dim) a layer."""
    weight, count = model.model.norm.weight, len(token_ids)
    cache = KVCache(model.config, 1, count, weight.dtype, weight.device)
    model.model(torch.tensor([token_ids], device=weight.device), cache=cache)
    return [
        torch.stack((keys[0, :, :count], values[0, :, :count])).float()
        for keys, values in zip(cache.keys, cache.values, strict=True)
    ]


def _set_prefixes(model: Llama, config: PrefixConfig, prefixes: list[Tensor]) -> None:
    backwards = torch.tensor([[-config.num_virtual_tokens]])
    cos, sin = (table.to(prefixes[0].device) for table in model.model.rotary_tables(backwards, torch.float32))
    for layer, prefix in zip(model.model.layers, prefixes, strict=True):
        layer.self_attn.attend = Prefix(prefix, cos, sin)
    model.prompt_tuning_config = config


def inject_llama_adapter(model: Llama, config: LlamaAdapterConfig) -> None:
    """Freeze the model and add LLaMA-Adapter to it, in place; it then computes what it did before, bit for bit.

    Afterwards the adapter's parameters (fp32) and, for version 2, the norms' weights (in the model's dtype) are the
    only ones that require a gradient. The head has neither bias nor scale: its logits never exist as a whole.

    Raises:
        InputError: the model has an adapter already, or fewer layers than `config.layers`.
    """
    adapted = config.adapted_layers(model.config)
    _freeze(model)
    device = model.model.norm.weight.device
    if config.version == 2:
        for layer in model.model.layers:
            for name, linear in list(layer.named_modules()):
                parent, _, child = name.rpartition(".")
                if isinstance(linear, nn.Linear | QuantizedLinear):
                    setattr(layer.get_submodule(parent), child, ScaledLinear(linear))
            layer.input_layernorm.requires_grad_(True)
            layer.post_attention_layernorm.requires_grad_(True)
        model.model.norm.requires_grad_(True)
    for number in adapted:
        layer = model.model.layers[number].self_attn
        layer.attend = GatedPrompt(layer, config.adapter_length, device)
    model.prompt_tuning_config = config


def _freeze(model: Llama) -> None:
    if getattr(model, "lora_config", None) or getattr(model, "prompt_tuning_config", None):
        raise InputError("the model carries an adapter already: start from a base, or merge a LoRA adapter first")
    model.requires_grad_(False)


def save_prompt_tuning(model: Llama, adapter_dir: Path | str, base_model: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors; each file is replaced as a whole.

    Args:
        base_model: path or name of the base, for PEFT's record.
    """
    config: PrefixConfig | LlamaAdapterConfig = model.prompt_tuning_config
    description = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True}
    if isinstance(config, PrefixConfig):
        shape = model.config
        description |= {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": config.num_virtual_tokens,
            "prefix_projection": False,
            "num_layers": shape.num_hidden_layers,
            "num_attention_heads": shape.num_key_value_heads,
            "token_dim": shape.num_key_value_heads * shape.head_dim,
            "num_transformer_submodules": 1,
        }
        prefixes = torch.stack([parameter.detach() for parameter in _prefixes(model).values()])
        # (layers, 2, kv_heads, n, head_dim) -> (n, layers * 2 * kv_heads * head_dim)
        state = {"prompt_embeddings": prefixes.permute(3, 0, 1, 2, 4).flatten(1)}
    else:
        description |= {
            "adapter_len": config.adapter_length,
            "adapter_layers": len(config.adapted_layers(model.config)),
            "target_modules": "self_attn",
        }
        if config.version == 1:
            description |= {"peft_type": "ADAPTION_PROMPT"}
        else:
            description |= {"peft_type": "LLAMA_ADAPTER_V2", "schema_version": _SCHEMA_VERSION}
        state = _llama_adapter_parameters(model)
    write_adapter(adapter_dir, description, state, model.fingerprint)


def load_prompt_tuning(model: Llama, adapter_dir: Path | str) -> None:
    """Put the prefix or LLaMA-Adapter of a directory on the model.

    Raises:
        InputError: no such adapter, another kind, an option that is not supported, tensors that do not fit the model,
            or a base other than the one it was trained on.
    """
    config = read_prompt_tuning_config(adapter_dir)
    state = read_adapter_state(adapter_dir, model.fingerprint)
    if isinstance(config, LlamaAdapterConfig):
        inject_llama_adapter(model, config)
        fill_parameters(_llama_adapter_parameters(model), state, adapter_dir)
        return
    _freeze(model)
    shape = model.config
    layers, heads, n = shape.num_hidden_layers, shape.num_key_value_heads, config.num_virtual_tokens
    stored = nn.Parameter(torch.empty(n, layers * 2 * heads * shape.head_dim), requires_grad=False)
    fill_parameters({"prompt_embeddings": stored}, state, adapter_dir)
    prefixes = stored.view(n, layers, 2, heads, shape.head_dim).permute(1, 2, 3, 0, 4)
    _set_prefixes(model, config, [prefix.contiguous() for prefix in prefixes.to(model.model.norm.weight.device)])


def read_prompt_tuning_config(adapter_dir: Path | str) -> PrefixConfig | LlamaAdapterConfig:
    """The configuration of an adapter directory; what this project does not implement is refused by name."""
    path = Path(adapter_dir) / "adapter_config.json"
    stated = read_json(path)
    peft_type = stated.get("peft_type")
    if peft_type not in _PEFT_TYPES:
        raise InputError(f"{path}: peft_type is {peft_type!r}; here it can be {', '.join(_PEFT_TYPES)}")
    plain_values: dict[str, tuple] = {
        "modules_to_save": (None, []),
        "num_transformer_submodules": (1, None),
        "target_modules": ("self_attn", None),
        "schema_version": (_SCHEMA_VERSION,),
    }
    for name, allowed in plain_values.items():
        if stated.get(name, allowed[0]) not in allowed:
            raise InputError(f"{path}: {name} = {stated[name]!r} is not supported")
    version = _PEFT_TYPES[peft_type]
    numbers = ("num_virtual_tokens",) if version is None else ("adapter_len", "adapter_layers")
    for name in numbers:
        if not isinstance(stated.get(name), int):
            raise InputError(f"{path}: {name} = {stated.get(name)!r} is not a number")
    try:
        if version is None:
            return PrefixConfig(stated["num_virtual_tokens"])
        return LlamaAdapterConfig(version, stated["adapter_len"], stated["adapter_layers"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _prefixes(model: Llama) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(".attend.prefix")}


def _llama_adapter_parameters(model: Llama) -> dict[str, nn.Parameter]:
    """What is trained, by the name it is stored under."""
    own: tuple[Any, ...] = (".adaption_prompt", ".adaption_gate", ".adapter_scale", ".adapter_bias")
    trains_norms = model.prompt_tuning_config.version == 2
    return {
        PEFT_PREFIX + name.replace(".attend.", "."): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(own) or (trains_norms and "norm" in name)
    }
