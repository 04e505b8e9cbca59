"""What training keeps of the forward pass for the backward, and what it works out again or puts aside instead.

    default             cheap parts (norms, SwiGLU) are worked out again from what is kept anyway: a third less memory
    checkpoint k        of every k-th decoder layer only the input is kept; the layer runs again in the backward
    mlp_tiles n         the MLP runs on n pieces of the sequence one after the other, again in the backward
    offload             what is kept of a layer waits in the host's pinned memory

Each gives the same losses and gradients, dropout included, and they can be combined. `apply_activation_config`
sets them on a model. Not here: the loss, which keeps no logits in any case (`loss.py`).
"""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_llama.command_line import progress
from lit_llama.errors import InputError
from lit_llama.lora_linear import LoRALinear
from lit_llama.model import Attention, DecoderLayer, Llama, call_layer
from lit_llama.prompt_tuning import GatedPrompt, Prefix
from lit_llama.quantization import QuantizedLinear

_SMALLEST_OFFLOADED = 2**16
"""Elements; smaller tensors would cost more in transfers than they free."""


@dataclass
class ActivationConfig:
    """Memory of activations against time."""

    checkpoint: int = 0
    """Keep only the input of every k-th decoder layer and run that layer again in the backward. 1: all layers (a
    quarter to a third slower); 2: every second; 0: none."""
    mlp_tiles: int = 1
    """Run the MLP on so many pieces of the sequence, one after the other; for long windows."""
    offload: bool = False
    """Keep activations in the host's memory; with checkpoint 1, only the layers' inputs are left to move."""

    def __post_init__(self) -> None:
        if self.checkpoint < 0:
            raise InputError(f"activations.checkpoint {self.checkpoint}: 0 (none), 1 (all layers), 2 (every other) ...")
        if self.mlp_tiles < 1:
            raise InputError(f"activations.mlp_tiles {self.mlp_tiles} must be at least 1")


def apply_activation_config(
    model: Llama, config: ActivationConfig, device: torch.device | None = None, compile_layers: bool = False
) -> None:
    """Set how the decoder layers of `model` run when there is a gradient, in place.

    Args:
        device: where the model will be trained; by default where it is.
        compile_layers: by `torch.compile`, once for all layers. Evaluation, and so every figure that is reported, runs
            the layers as they are.
    """
    device = device or model.model.norm.weight.device
    offloading = config.offload and device.type == "cuda"
    if config.offload and not offloading:
        progress(f"note: activations.offload has no effect on {device.type}, only on CUDA")
    stream = torch.cuda.Stream(device) if offloading else None
    not_activations = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    checkpointed = set()
    for number, layer in enumerate(model.model.layers):
        if config.checkpoint and number % config.checkpoint == 0:
            checkpointed.add(layer)
        # All three work by hooks on saved tensors, of which only the innermost are called; compiled code has none.
        layer.mlp.recompute_cheap = not (layer in checkpointed or offloading or compile_layers)
        layer.mlp.tiles = config.mlp_tiles

    run = _compiled(model, device) if compile_layers else call_layer

    def run_layer(layer: DecoderLayer, *arguments: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return call_layer(layer, *arguments)
        with _OffloadedTensors(device, stream, not_activations) if offloading else nullcontext():
            if layer in checkpointed:
                return checkpoint(run, layer, *arguments, use_reentrant=False)
            return run(layer, *arguments)

    model.model.run_layer = run_layer


def _compiled(model: Llama, device: torch.device) -> Callable[..., Tensor]:
    """`call_layer` compiled: norms, rotation, SwiGLU and sums, each fused. One compilation serves all layers.

    Products and attention are left out: they are single kernels already, free their parts by hand, and attention's
    mask differs from batch to batch, which would mean compiling for each.
    """
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise InputError("train.compile needs a C++ compiler on a CPU: install g++, or leave it out")
    for module in model.model.layers.modules():
        if isinstance(module, Attention) and not isinstance(module.attend, nn.Module):
            module.attend = torch.compiler.disable(module.attend)
        elif isinstance(module, LoRALinear | QuantizedLinear | Prefix | GatedPrompt):
            module.forward = torch.compiler.disable(module.forward)
    return torch.compile(call_layer, dynamic=False)


class _OffloadedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Copies what one layer saves to pinned host memory while the GPU goes on, and back when the backward asks."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream, not_activations: set[int]) -> None:
        # A tensor that several operations save moves once. Held here, so that its address is not used again meanwhile.
        moved: dict[tuple, tuple[Tensor, tuple[Tensor, torch.cuda.Event]]] = {}

        def pack(tensor: Tensor) -> Tensor | tuple[Tensor, torch.cuda.Event]:
            storage = tensor.untyped_storage().data_ptr()
            if tensor.device.type != device.type or tensor.numel() < _SMALLEST_OFFLOADED or storage in not_activations:
                return tensor
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if key not in moved:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(stream):
                    host.copy_(tensor, non_blocking=True)
                    tensor.record_stream(stream)
                    moved[key] = (tensor, (host, stream.record_event()))
            return moved[key][1]

        def unpack(packed: Tensor | tuple[Tensor, torch.cuda.Event]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            host, copied = packed
            torch.cuda.current_stream(device).wait_event(copied)
            return host.to(device, non_blocking=True)

        super().__init__(pack, unpack)
