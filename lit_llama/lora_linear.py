"""One linear layer under LoRA: its update, its variants DoRA and PiSSA, and the product as one autograd function.

               x (..., in)
              / \\
    linear.weight  lora_A (r, in)      A: Kaiming-uniform, B: zero, so training starts at the base model
     (out, in)     lora_B (out, r)
              \\ /
               y (..., out)            DoRA: * lora_magnitude_vector (out,) / norm of each row of W + (alpha / r) B A

Which layers of a model get one, and how an adapter is saved, is `lora.py`; the loss through an adapted head, `loss.py`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lit_llama.errors import InputError
from lit_llama.functional import ROW_BLOCK


class LoRALinear(nn.Module):
    """A frozen linear layer and its low-rank update; the base layer may be quantized.

    In state dicts the base weight keeps the name it had without the wrapper.

    The update is scaling * (B A + B0 A0), where A0 and B0, if there are any, are frozen: those of an adapter that this
    one is stacked on, or, negated, the initial ones of PiSSA. (PiSSA is usually told as moving the principal components
    out of the base weight into the adapter. Here the base stays: the same function and the same gradients, and the
    saved adapter, `factors`, computes on the original base the very numbers that were trained.)
    """

    def __init__(
        self,
        linear: nn.Module,
        r: int,
        scaling: float,
        dropout: float,
        dora: bool = False,
        init: str = "kaiming",
    ) -> None:
        super().__init__()
        self.linear = linear
        self.scaling = scaling
        self.dropout = dropout
        self.first_row = 0
        """Where in the whole the rows of the next call lie, when they come piece by piece (`model.MLP`)."""
        device = next(iter(linear.state_dict().values())).device
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, device=device))
        self.lora_magnitude_vector = None
        self.register_buffer("lora_A_frozen", None)
        self.register_buffer("lora_B_frozen", None)
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            self._start_at_principal_components(init)
        if dora:
            norms = torch.linalg.vector_norm(dense_weight(linear, torch.float32), dim=1)
            self.lora_magnitude_vector = nn.Parameter(norms)
        self.register_state_dict_post_hook(_hide_wrapper)
        self.register_load_state_dict_pre_hook(_show_wrapper)

    @torch.no_grad()
    def _start_at_principal_components(self, init: str) -> None:
        weight, r = dense_weight(self.linear, torch.float32), len(self.lora_A)
        if r > min(weight.shape):
            raise InputError(f"rank {r} is more than a weight of shape {tuple(weight.shape)} has: PiSSA needs a lower")
        if init == "pissa":
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
        else:
            left, values, right = torch.svd_lowrank(weight, r, niter=int(init.removeprefix("pissa_niter_")))
            right = right.T
        root = (values[:r] / self.scaling).sqrt()
        self.lora_A.copy_(root[:, None] * right[:r])
        self.lora_B.copy_(left[:, :r] * root)
        self.stack_on(self.lora_A, -self.lora_B)

    @torch.no_grad()
    def stack_on(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Add frozen factors (k, in) and (out, k), under this layer's scaling, to those that are there."""
        for name, factor, dim in (("lora_A_frozen", lora_A, 0), ("lora_B_frozen", lora_B, 1)):
            before = getattr(self, name)
            setattr(self, name, factor.clone() if before is None else torch.cat((before, factor), dim=dim))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) with scaling * B A the update of the base weight, frozen factors included."""
        if self.lora_A_frozen is None:
            return self.lora_A, self.lora_B
        A, B = self.lora_A, self.lora_B
        # Sharded training puts whole parameters on the CPU while it saves them.
        return torch.cat((A, self.lora_A_frozen.to(A.device))), torch.cat((B, self.lora_B_frozen.to(B.device)), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return LoRALinearFunction.apply(
            x, *self.factors(), self.lora_magnitude_vector, self.scaling, dropout, self.linear, self.first_row
        )

    def delta_weight(self) -> Tensor:
        """The update of the weight, fp32 (out, in), before DoRA's norms."""
        lora_A, lora_B = self.factors()
        return self.scaling * (lora_B.detach().float() @ lora_A.detach().float())

    def merged_weight(self) -> Tensor:
        """The weight of one linear layer that does the same, fp32 (out, in)."""
        weight = dense_weight(self.linear, torch.float32) + self.delta_weight()
        if self.lora_magnitude_vector is not None:
            norms = torch.linalg.vector_norm(weight, dim=1)
            weight *= (self.lora_magnitude_vector.detach() / norms)[:, None]
        return weight


class LoRALinearFunction(torch.autograd.Function):
    """Base and update as one function: no second copy of the output, nothing saved but x and A x, no gradient of
    frozen weights.

    Adapter weights are kept in fp32 and used in x's dtype. A quantized base is dequantized again in the backward, so
    that no dense copy of it stays alive; likewise dropout keeps a seed and draws its mask again.

    With D = dropout's mask / (1 - p), W the base, c the scaling, and for DoRA s = magnitude / rownorm(W + c B A), where
    the norm counts as a constant (section 4.3 of the paper):

        LoRA  y = W x + c B A D x
        DoRA  y = W (x - D x) + s (W + c B A) D x        (as PEFT: dropout acts on W's share of the change as well)
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor | None,
        scaling: float,
        dropout: float,
        linear: nn.Module,
        first_row: int,
    ) -> Tensor:
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        rows = x.flatten(0, -2)
        weight = dense_weight(linear, x.dtype)
        dropped, ctx.seed = drop(rows, dropout, first_row)
        low = dropped @ A.T  # (rows, r)
        norms = None
        if magnitude is None:
            output = F.linear(rows, weight).addmm_(low, B.T, alpha=scaling)
        else:
            norms = updated_row_norms(weight, lora_A, lora_B, scaling)
            output = F.linear(dropped, weight).addmm_(low, B.T, alpha=scaling).mul_((magnitude / norms).to(x.dtype))
            if dropout:
                output += F.linear(rows - dropped, weight)
        ctx.save_for_backward(x, low, lora_A, lora_B, magnitude, norms)
        ctx.scaling, ctx.dropout, ctx.linear, ctx.first_row = scaling, dropout, linear, first_row
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, low, lora_A, lora_B, magnitude, norms = ctx.saved_tensors
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        grad_rows, rows = grad_output.flatten(0, -2), x.flatten(0, -2)
        weight = dense_weight(ctx.linear, x.dtype) if ctx.needs_input_grad[0] or magnitude is not None else None
        mask = dropout_mask(rows, ctx.dropout, ctx.seed, ctx.first_row) if ctx.dropout else None
        dropped = rows if mask is None else rows * mask
        grad_x = grad_A = grad_B = grad_magnitude = None
        grad_updated = grad_rows  # of (W + c B A) D x
        if magnitude is not None:
            updated = F.linear(dropped, weight).addmm_(low, B.T, alpha=ctx.scaling)
            grad_magnitude = updated.mul_(grad_rows).sum(0, dtype=norms.dtype) / norms
            grad_updated = grad_rows * (magnitude / norms).to(x.dtype)
        grad_low = (grad_updated @ B).mul_(ctx.scaling)  # (rows, r)
        if ctx.needs_input_grad[0]:
            if mask is None:
                grad_x = (grad_updated @ weight).addmm_(grad_low, A)
            else:
                grad_dropped = grad_low @ A
                if magnitude is not None:
                    grad_dropped.addmm_(grad_updated - grad_rows, weight)
                grad_x = (grad_rows @ weight).addcmul_(grad_dropped, mask)
            grad_x = grad_x.view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_A = (grad_low.T @ dropped).to(lora_A.dtype)
        if ctx.needs_input_grad[2]:
            # Twice as fast on CPU as the product of the transposes.
            grad_B = (low.T @ grad_updated).T.to(lora_B.dtype).mul_(ctx.scaling)
        return grad_x, grad_A, grad_B, grad_magnitude, None, None, None, None


def drop(rows: Tensor, dropout: float, first_row: int) -> tuple[Tensor, int | None]:
    """(rows times a mask, the seed by which `dropout_mask` draws it again in the backward)."""
    if not dropout:
        return rows, None
    # Drawn on the CPU whatever the device: no synchronisation, and checkpointed blocks draw the same again.
    seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    return rows * dropout_mask(rows, dropout, seed, first_row), seed


def dropout_mask(rows: Tensor, dropout: float, seed: int, first_row: int) -> Tensor:
    """Of the shape and dtype of `rows`: 0 with probability `dropout` (to 2 ** -16), else the inverse of the rest.

    Drawn block by block, so that rows have the same mask whether they come with the others or in a piece of their own
    that begins with a block. Sixteen random bits an element take a third of the time that a Bernoulli draw of each
    takes on a CPU.
    """
    bits = torch.empty(rows.shape, dtype=torch.int16, device=rows.device)
    generator = torch.Generator(rows.device)
    for number, block in enumerate(bits.split(ROW_BLOCK), start=first_row // ROW_BLOCK):
        words = torch.empty(-(-block.numel() // 4), dtype=torch.int64, device=rows.device)
        words.random_(-(2**63), None, generator=generator.manual_seed((seed + number) % 2**63))
        block.copy_(words.view(torch.int16)[: block.numel()].view(block.shape))
    levels_dropped = min(round(dropout * 2**16), 2**16 - 1)
    kept = bits >= levels_dropped - 2**15
    return kept.to(rows.dtype).mul_(2**16 / (2**16 - levels_dropped))


def updated_row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Norms of the rows of W + scaling * B A in fp32, (out,), without making that matrix."""
    dtype = torch.promote_types(weight.dtype, lora_A.dtype)
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square_()
    crossed = (weight @ lora_A.to(weight.dtype).T).to(dtype)  # (out, r)
    squares += (lora_B * (2 * scaling * crossed + scaling**2 * (lora_B @ (lora_A @ lora_A.T)))).sum(1)
    return squares.sqrt_()


def dense_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of a linear layer in `dtype`; a quantized layer dequantizes it for the moment."""
    weight = linear.weight if isinstance(linear, nn.Linear) else linear.dequantize(dtype)
    return weight.to(dtype)


def _hide_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}linear.")]:
        state[prefix + name.removeprefix(f"{prefix}linear.")] = state.pop(name)


def _show_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = (f"{prefix}lora_", f"{prefix}linear.")
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(own)]:
        state[f"{prefix}linear.{name.removeprefix(prefix)}"] = state.pop(name)
