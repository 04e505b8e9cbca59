"""Linear layers whose frozen weight is stored in 4 or 8 bits: the base of QLoRA and of generation in little memory.

    nf4      4-bit NormalFloat, blocks of 64 with an fp32 scale each: 4.5 bits a weight (Dettmers et al. 2023, arXiv
             2305.14314)
    nf4-dq   the same with the scales quantized to 8 bits too ("double quantization"): 4.127 bits a weight
    int4     4-bit integers, a bf16 scale and minimum for each 32 of a row: 5 bits a weight (as Q4_1 of llama.cpp)
    int8     8-bit integers with one fp32 scale an output row

The kernels of NF4 are bitsandbytes'. The layer is our own because bitsandbytes' repacks its weight in place on some
CPUs, after which training silently has no gradient. Here the packed weight never changes; a dense copy exists only
while a product runs, forward or backward, so that training, evaluation and generation compute with the very same
numbers.
"""

import logging
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lit_llama.config import Quantization
from lit_llama.errors import InputError

_NF4_BLOCK = 64
_SCALES_BLOCK = 256
_INT4_GROUP = 32
# Rows that are dense at one time of a weight as tall as the vocabulary.
_ROWS = 8192
# Weights that int4 is fitted to at a time: few enough for a processor's cache.
_FITTED = 1 << 19


class FourBitWeight(NamedTuple):
    """A weight (out, in) of one number of a table of 16 each, scaled: levels[code] * scale (+ minimum) of its group."""

    codes: Tensor
    """uint8, out * in / 2: row by row two a byte, the first in its upper half."""
    levels: Tensor
    """fp32 (16,)"""
    scales: Tensor
    """fp32 or bf16, out * in / group."""
    minima: Tensor | None
    """As the scales; None: nothing is added."""
    group: int


class QuantizedLinear(nn.Module):
    """A frozen linear layer without bias whose weight (out, in) is stored quantized; made by `from_weight`."""

    def __init__(self, mode: Quantization, out_features: int, in_features: int) -> None:
        super().__init__()
        self.mode = mode
        self.out_features, self.in_features = out_features, in_features
        self.unpack: Callable[[slice, torch.dtype], Tensor] | None = None
        """Makes rows dense, to the same bits as is done here but quicker; `cpu_decode.py` has it for generating."""

    @classmethod
    def from_weight(cls, weight: Tensor, mode: Quantization) -> "QuantizedLinear":
        """Quantize a dense weight (out, in) on the device where it lies.

        Raises:
            InputError: unknown mode, rows that int4 cannot group, or bitsandbytes missing for NF4.
        """
        if mode not in get_args(Quantization):
            raise InputError(f"quantize = {mode!r} is not one of {', '.join(get_args(Quantization))}")
        layer = cls(mode, *weight.shape)
        weight = weight.detach()
        if mode == "int8":
            pieces = [to_int8(piece) for piece in weight.split(_ROWS)]
            layer.register_buffer("codes", torch.cat([codes for codes, _ in pieces]))
            layer.register_buffer("scale", torch.cat([scale for _, scale in pieces]))  # (out, 1)
            return layer
        if mode == "int4":
            if weight.shape[1] % _INT4_GROUP:
                raise InputError(
                    f"int4 needs layers whose inputs are a multiple of {_INT4_GROUP}, not {weight.shape[1]}:"
                    " use nf4 or int8"
                )
            pieces = [to_int4(piece) for piece in weight.split(max(1, _FITTED // weight.shape[1]))]
            for name, tensors in zip(("codes", "scales", "minima"), zip(*pieces, strict=True), strict=True):
                layer.register_buffer(name, torch.cat(tensors))
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
        if self.unpack is not None:
            return self.unpack(slice(0, self.out_features), dtype)
        if self.mode == "int8":
            return self.dequantize_rows(slice(None), dtype)
        if self.mode == "int4":
            codes = torch.stack((self.codes >> 4, self.codes & 15), dim=-1).view(*self.scales.shape, _INT4_GROUP)
            parts = (self.minima[..., None], codes, self.scales[..., None])
            return torch.addcmul(*(part.to(dtype) for part in parts)).view(self.out_features, self.in_features)
        import bitsandbytes.functional as kernels  # there since `from_weight`; the compiler follows no cached function

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

    @property
    def has_four_bits(self) -> bool:
        """Whether `four_bits` has something to give: not for 8 bits, nor where rows do not begin with a group."""
        return self.mode == "int4" or (self.mode != "int8" and self.in_features % _NF4_BLOCK == 0)

    def four_bits(self) -> FourBitWeight | None:
        """How the weight is stored; None unless `has_four_bits`.

        No copy, but that double quantization's scales are made whole.
        """
        if self.mode == "int4":
            levels = torch.arange(16, dtype=torch.float32, device=self.codes.device)
            return FourBitWeight(self.codes, levels, self.scales, self.minima, _INT4_GROUP)
        if not self.has_four_bits:
            return None
        scales = self.scales
        if self.mode == "nf4-dq":
            scales = _bitsandbytes().dequantize_blockwise(
                scales, absmax=self.scales_scales, code=self.scales_levels, blocksize=_SCALES_BLOCK
            )
            scales = scales + self.scales_mean
        return FourBitWeight(self.codes, self.levels, scales, None, _NF4_BLOCK)

    def dequantize_rows(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of an int8 weight, dense; a tensor of indices gives (*its shape, in)."""
        return (self.codes[rows] * self.scale[rows]).to(dtype)

    def dense_pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their dense weight), few enough at a time for a weight as tall as the vocabulary; int8 only."""
        for start in range(0, self.out_features, _ROWS):
            rows = slice(start, min(start + _ROWS, self.out_features))
            yield rows, (self.unpack or self.dequantize_rows)(rows, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return QuantizedLinearFunction.apply(x, self)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, mode={self.mode}"


class QuantizedLinearFunction(torch.autograd.Function):
    """x @ W.T, with the dense W made again for the backward instead of being saved."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        if layer.mode == "int8" and layer.out_features > _ROWS:
            return torch.cat([F.linear(x, dense) for _, dense in layer.dense_pieces(x.dtype)], dim=-1)
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output @ ctx.layer.dequantize(grad_output.dtype), None


class QuantizedEmbedding(nn.Module):
    """Embedding whose table (vocab, hidden) is stored in int8; a tied head is the very same table."""

    def __init__(self, table: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.table, self.dtype = table, dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table.dequantize_rows(input_ids, self.dtype)


class HostEmbedding(nn.Module):
    """Embedding whose table (vocab, hidden) stays in the host's memory; only the rows looked up go to the device.

    The lookup waits for the ids, one synchronisation a forward pass. Frozen.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight.detach()  # no Parameter: `module.to(device)` shall leave it where it is

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids.to(self.weight.device), self.weight).to(input_ids.device)


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 of x's shape, scale fp32 (..., 1)) of the rows of a dense x (..., n): the largest becomes 127."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12) / 127
    return torch.round(x / scale).to(torch.int8), scale


def to_int4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 (rows, n / 2), scale bf16 (rows, n / 32), minimum bf16 likewise) of a dense x (rows, n).

    A number is code * scale + minimum of its group. They span the group at first; then the line through its numbers
    that is best by least squares for their codes is taken where it is nearer: that undoes what rounding the scale did.
    """
    groups = x.float().unflatten(-1, (-1, _INT4_GROUP))

    def fit(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, minimum = scale.bfloat16(), minimum.bfloat16()
        codes = ((groups - minimum) / scale.float()).round_().clamp_(0, 15)
        error = (torch.addcmul(minimum.float(), codes, scale.float()) - groups).square_().sum(dim=-1, keepdim=True)
        return codes, scale, minimum, error

    low, high = groups.aminmax(dim=-1, keepdim=True)
    spanning = fit(((high - low) / 15).clamp_(min=1e-12), low)
    codes, scale = spanning[0], spanning[1].float()
    mean, mean_code = groups.mean(dim=-1, keepdim=True), codes.mean(dim=-1, keepdim=True)
    apart = codes - mean_code
    slope = (apart * (groups - mean)).sum(dim=-1, keepdim=True) / apart.square().sum(dim=-1, keepdim=True).clamp_(min=1)
    slope = torch.where(slope > 0, slope, scale)
    fitted = fit(slope, mean - slope * mean_code)
    codes, scale, minimum, _ = (
        torch.where(fitted[-1] < spanning[-1], new, old) for new, old in zip(fitted, spanning, strict=True)
    )
    codes = codes.flatten(1).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale[..., 0], minimum[..., 0]


@cache
def _bitsandbytes() -> ModuleType:
    # On import it warns that a package of extra kernels is missing, which would fetch code from a hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    except ImportError:
        raise InputError("NF4 needs the package bitsandbytes: pip install bitsandbytes, or use int4 or int8") from None
    return bitsandbytes.functional
