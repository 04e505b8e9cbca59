"""Linear layers whose frozen weight is stored in 4 or 8 bits: the base of QLoRA and of generation in little memory.

    nf4      4-bit NormalFloat, blocks of 64 with an fp32 scale each: 4.5 bits a weight (Dettmers et al. 2023, arXiv
    2305.14314) nf4-dq   the same with the scales quantized to 8 bits too ("double quantization"): 4.127 bits a weight
    int8     8-bit integers with one fp32 scale an output row

The kernels of NF4 are bitsandbytes'. The layer is our own because bitsandbytes' repacks its weight in place on some
CPUs, after which training silently has no gradient. Here the packed weight never changes; a dense copy exists only
while a product runs, forward or backward, so that training, evaluation and generation compute with the very same
numbers.
"""

import logging
from functools import cache
from types import ModuleType
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lit_llama.errors import InputError

Quantization = Literal["nf4", "nf4-dq", "int8"]
"""Ways to store the base weights."""

_NF4_BLOCK = 64
_SCALES_BLOCK = 256


class QuantizedLinear(nn.Module):
    """A frozen linear layer without bias whose weight (out, in) is stored quantized; made by `from_weight`."""

    def __init__(self, mode: Quantization, out_features: int, in_features: int) -> None:
        super().__init__()
        self.mode = mode
        self.out_features, self.in_features = out_features, in_features

    @classmethod
    def from_weight(cls, weight: Tensor, mode: Quantization) -> "QuantizedLinear":
        """Quantize a dense weight (out, in) on the device where it lies.

        Raises:
            InputError: unknown mode, or bitsandbytes missing for NF4.
        """
        if mode not in get_args(Quantization):
            raise InputError(f"quantize = {mode!r} is not one of {', '.join(get_args(Quantization))}")
        layer = cls(mode, *weight.shape)
        weight = weight.detach()
        if mode == "int8":
            scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_(min=1e-12) / 127  # (out, 1)
            layer.register_buffer("codes", torch.round(weight.float() / scale).to(torch.int8))
            layer.register_buffer("scale", scale)
            return layer
        kernels = _bitsandbytes()
        codes, state = kernels.quantize_4bit(
            weight.contiguous(), blocksize=_NF4_BLOCK, quant_type="nf4", compress_statistics=mode == "nf4-dq"
        )
        layer.register_buffer("codes", codes)  # two a byte
        layer.register_buffer("levels", state.code)  # the 16 values of NF4
        layer.register_buffer("scales", state.absmax)  # one a block: fp32, or uint8 with double quantization
        if mode == "nf4-dq":
            layer.register_buffer("scales_mean", state.offset)
            layer.register_buffer("scales_scales", state.state2.absmax)
            layer.register_buffer("scales_levels", state.state2.code)
        return layer

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight as stored, dense (out, in)."""
        if self.mode == "int8":
            return (self.codes * self.scale).to(dtype)
        kernels = _bitsandbytes()
        nested = None
        if self.mode == "nf4-dq":
            nested = kernels.QuantState(
                absmax=self.scales_scales, code=self.scales_levels, blocksize=_SCALES_BLOCK, dtype=torch.float32
            )
        state = kernels.QuantState(
            absmax=self.scales,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.levels,
            blocksize=_NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.scales_mean if nested else None,
            state2=nested,
        )
        return kernels.dequantize_4bit(self.codes, state)

    def forward(self, x: Tensor) -> Tensor:
        return QuantizedLinearFunction.apply(x, self)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, mode={self.mode}"


class QuantizedLinearFunction(torch.autograd.Function):
    """x @ W.T, with the dense W made again for the backward instead of being saved."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output @ ctx.layer.dequantize(grad_output.dtype), None


@cache
def _bitsandbytes() -> ModuleType:
    # On import it warns that a package of extra kernels is missing, which would fetch code from a hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    except ImportError:
        raise InputError("NF4 needs the package bitsandbytes: pip install bitsandbytes, or use int8") from None
    return bitsandbytes.functional
