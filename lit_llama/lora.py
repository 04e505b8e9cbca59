"""LoRA on named linear layers (Hu et al. 2021, arXiv 2106.09685): y = W x + (alpha / r) B A x.

`inject_lora` wraps the chosen linear layers of a model in place; the model itself knows nothing of it. Base weights are
frozen and never touched: merging is explicit (`merge_lora`), never a side effect of eval(). Adapters are stored as
PEFT stores them, so that `peft.PeftModel.from_pretrained(base, adapter_dir)` opens one and a PEFT adapter opens here.

               x (..., in)
              / \\
    linear.weight  lora_A (r, in)      A: Kaiming-uniform, B: zero, so training starts at the base model
     (out, in)     lora_B (out, r)
              \\ /
               y (..., out)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lit_llama.errors import InputError
from lit_llama.files import atomic_path, read_json, write_json

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder layer, each a possible target."""

_PEFT_PREFIX = "base_model.model."


@dataclass
class LoRAConfig:
    """What to adapt and how much."""

    r: int = 16
    """Rank: width of the bottleneck. Knowledge needs more than style; 16-64 is usual."""
    alpha: float = 32
    """The update is scaled by alpha / r, so alpha can stay while r varies."""
    dropout: float = 0.0
    """Probability of dropping an input element on the adapter's path while training."""
    targets: list[str] = field(default_factory=lambda: list(LINEAR_NAMES))
    """Linear layers to adapt: any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."""
    rank_per_target: dict[str, int] = field(default_factory=dict)
    """Another rank for some targets, {"q_proj": 8}."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732): keeps high ranks learning."""

    def __post_init__(self) -> None:
        unknown = [name for name in [*self.targets, *self.rank_per_target] if name not in LINEAR_NAMES]
        if unknown:
            raise InputError(f"lora target {unknown[0]!r} is not a linear layer; choose from {', '.join(LINEAR_NAMES)}")
        if not self.targets:
            raise InputError("lora.targets is empty: nothing would be trained")
        not_targeted = set(self.rank_per_target) - set(self.targets)
        if not_targeted:
            raise InputError(f"lora.rank_per_target names {sorted(not_targeted)}, which lora.targets does not")
        if min([self.r, *self.rank_per_target.values()]) < 1:
            raise InputError("lora ranks must be at least 1")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout {self.dropout} is not in [0, 1)")

    def rank(self, target: str) -> int:
        """Rank of the layers called `target`."""
        return self.rank_per_target.get(target, self.r)

    def scaling(self, target: str) -> float:
        """Factor of the update of the layers called `target`."""
        rank = self.rank(target)
        return self.alpha / math.sqrt(rank) if self.rslora else self.alpha / rank


class LoRALinear(nn.Module):
    """A frozen linear layer and its low-rank update; the base layer may be quantized.

    In state dicts the base weight keeps the name it had without the wrapper.
    """

    def __init__(self, linear: nn.Module, r: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.linear = linear
        self.scaling = scaling
        self.dropout = dropout
        device = next(iter(linear.state_dict().values())).device
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.register_state_dict_post_hook(_hide_wrapper)
        self.register_load_state_dict_pre_hook(_show_wrapper)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.dropout:
            update = F.linear(F.dropout(x, self.dropout), self.lora_A.to(x.dtype))
            return self.linear(x) + F.linear(update, self.lora_B.to(x.dtype)) * self.scaling
        return LoRALinearFunction.apply(x, self.lora_A, self.lora_B, self.scaling, self.linear)

    def delta_weight(self) -> Tensor:
        """The update of the weight, fp32 (out, in)."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())


class LoRALinearFunction(torch.autograd.Function):
    """Base and update as one function: no second copy of the output, nothing saved but x and A x, no gradient of
    frozen weights.

    Adapter weights are kept in fp32 and used in x's dtype. A quantized base is dequantized again in the backward, so
    that no dense copy of it stays alive.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, linear: nn.Module
    ) -> Tensor:
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        rows = x.flatten(0, -2)
        low = rows @ A.T  # (rows, r)
        output = F.linear(rows, dense_weight(linear, x.dtype)).addmm_(low, B.T, alpha=scaling)
        ctx.save_for_backward(x, low, lora_A, lora_B)
        ctx.scaling, ctx.linear = scaling, linear
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, low, lora_A, lora_B = ctx.saved_tensors
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        grad_rows = grad_output.flatten(0, -2)
        grad_low = (grad_rows @ B).mul_(ctx.scaling)  # (rows, r)
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ dense_weight(ctx.linear, x.dtype)).addmm_(grad_low, A).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_A = (grad_low.T @ x.flatten(0, -2)).to(lora_A.dtype)
        if ctx.needs_input_grad[2]:
            grad_B = (grad_rows.T @ low).to(lora_B.dtype).mul_(ctx.scaling)
        return grad_x, grad_A, grad_B, None, None


def dense_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of a linear layer in `dtype`; a quantized layer dequantizes it for the moment."""
    weight = linear.weight if isinstance(linear, nn.Linear) else linear.dequantize(dtype)
    return weight.to(dtype)


def _hide_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}linear.")]:
        state[prefix + name.removeprefix(f"{prefix}linear.")] = state.pop(name)


def _show_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = (f"{prefix}lora_A", f"{prefix}lora_B", f"{prefix}linear.")
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(own)]:
        state[f"{prefix}linear.{name.removeprefix(prefix)}"] = state.pop(name)


def inject_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Freeze the model and wrap every linear layer named by `config.targets`, in place.

    Afterwards the adapter's parameters (fp32) are the only ones that require a gradient.

    Raises:
        InputError: the model has an adapter already, or no layer of that name.
    """
    if any(True for _ in lora_layers(model)):
        raise InputError("the model carries an adapter already: merge it first")
    model.requires_grad_(False)
    for target in config.targets:
        parents = [module for module in model.modules() if hasattr(module, target)]
        if not parents:
            raise InputError(f"the model has no linear layer called {target!r}")
        for parent in parents:
            linear = getattr(parent, target)
            wrapped = LoRALinear(linear, config.rank(target), config.scaling(target), config.dropout)
            setattr(parent, target, wrapped.train(parent.training))
    model.lora_config = config


def merge_lora(model: nn.Module) -> None:
    """Add the adapter's update to the base weights, in fp32, and unwrap the layers, in place.

    Raises:
        InputError: the base is quantized. Merging into quantized weights and quantizing again loses part of the update;
            merge into the unquantized checkpoint instead.
    """
    for name, layer in list(lora_layers(model)):
        if not isinstance(layer.linear, nn.Linear):
            raise InputError(f"{name} is quantized: merge the adapter into the unquantized base instead")
        weight = layer.linear.weight
        with torch.no_grad():
            weight.copy_(weight.float() + layer.delta_weight().to(weight.device))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.linear)
    model.lora_config = None


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, layer) of the wrapped linear layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    return {
        f"{_PEFT_PREFIX}{name}.lora_{side}.weight": getattr(layer, f"lora_{side}").detach()
        for name, layer in lora_layers(model)
        for side in "AB"
    }


def save_adapter(model: nn.Module, adapter_dir: Path | str, base_model: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors in PEFT's layout; each file is replaced as a whole.

    Args:
        base_model: path or name of the base, for PEFT's record. The base's fingerprint is kept beside the tensors, so
            that the adapter is not put on another base by mistake.
    """
    adapter_dir = Path(adapter_dir)
    adapter_dir.mkdir(parents=True, exist_ok=True)
    config: LoRAConfig = model.lora_config
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "rank_pattern": dict(config.rank_per_target),
        "alpha_pattern": {},
        "use_rslora": config.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    # One key at most: safetensors writes several in random order, and equal adapters shall be equal files.
    metadata = {"base_fingerprint": model.fingerprint} if model.fingerprint else None
    state = {name: tensor.cpu().contiguous() for name, tensor in adapter_state(model).items()}
    with atomic_path(adapter_dir / "adapter_model.safetensors") as temporary:
        save_file(state, temporary, metadata=metadata)
    write_json(adapter_dir / "adapter_config.json", description)


def read_adapter_config(adapter_dir: Path | str) -> LoRAConfig:
    """The LoRAConfig of an adapter directory; PEFT options that this project does not implement are refused by name."""
    path = Path(adapter_dir) / "adapter_config.json"
    stated = read_json(path)
    if stated.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {stated.get('peft_type')!r}; only 'LORA' is supported")
    plain_values: dict[str, tuple] = {
        "alpha_pattern": ({}, None),
        "alora_invocation_tokens": (None,),
        "bias": ("none", None),
        "exclude_modules": (None,),
        "fan_in_fan_out": (False, None),
        "layer_replication": (None,),
        "layers_pattern": (None,),
        "layers_to_transform": (None,),
        "lora_bias": (False, None),
        "modules_to_save": (None, []),
        "target_parameters": (None, []),
        "trainable_token_indices": (None,),
        "use_bdlora": (None, False),
        "use_dora": (False, None),
        "use_qalora": (False, None),
    }
    for name, allowed in plain_values.items():
        if stated.get(name, allowed[0]) not in allowed:
            raise InputError(f"{path}: {name} = {stated[name]!r} is not supported")
    targets = stated["target_modules"]
    if not isinstance(targets, list):
        raise InputError(f"{path}: target_modules = {targets!r} is not a list of names")
    try:
        return LoRAConfig(
            r=stated["r"],
            alpha=stated["lora_alpha"],
            dropout=stated.get("lora_dropout", 0.0),
            targets=sorted(targets, key=lambda name: LINEAR_NAMES.index(name) if name in LINEAR_NAMES else -1),
            rank_per_target=stated.get("rank_pattern") or {},
            rslora=stated.get("use_rslora", False),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def load_adapter(model: nn.Module, adapter_dir: Path | str) -> None:
    """Inject the adapter of a PEFT directory into the model and load its weights (fp32).

    Raises:
        InputError: no such adapter, an unsupported kind, tensors that do not fit the model, or a base other than the
            one it was trained on.
    """
    path = Path(adapter_dir) / "adapter_model.safetensors"
    config = read_adapter_config(adapter_dir)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        state = load_file(path)
        with safe_open(path, framework="pt") as file:
            trained_on = (file.metadata() or {}).get("base_fingerprint")
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); was the copy cut short?") from None
    if trained_on and model.fingerprint and trained_on != model.fingerprint:
        raise InputError(
            f"{adapter_dir} was trained on another base (fingerprint {trained_on[:12]}) than the one loaded"
            f" ({model.fingerprint[:12]}); load the base it was trained on"
        )
    inject_lora(model, config)
    own = adapter_state(model)
    differing = sorted(own.keys() ^ state.keys())
    if differing:
        raise InputError(f"{path} does not fit the model: {differing[0]} is only in one of them")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise InputError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, this base needs {tuple(tensor.shape)}:"
                " the adapter was made for another base"
            )
        tensor.copy_(state[name])
