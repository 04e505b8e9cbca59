"""A linear layer with the leaves of a tree of LoRA adapters: y = W x + (alpha / r) sum_l c_l B_l A_l x.

The mixture of L leaves is one LoRA of rank L r whose bottleneck is weighted token by token: h = A x with the A_l below
each other, h = h * c with each c_l repeated r times, B h. So training takes two products, never a loop over leaves.
With one leaf a token there are three ways to the same result (`add_leaf_update_`). Which leaf is the routers' business
(`lora_tree_routing.py`).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lit_llama.lora_linear import dense_weight, drop, dropout_mask
from lit_llama.lora_tree_routing import Leaves, Router

Kernel = Literal["mask", "gather", "segment"]

_MASKED_RANKS = 256
"""Of all leaves; up to here multiplying with those not taken is hidden behind reading the base weight."""
_GATHER_COPIES = 3
"""A gathered leaf is read, written and read again; a leaf in place is read once."""


class LoRATreeLinear(nn.Module):
    """A frozen linear layer, perhaps quantized, and its leaves; `router` decides, which may be shared.

    Args:
        owned: the router is this layer's own and looks at its input.
    """

    def __init__(
        self, linear: nn.Module, leaves: int, r: int, scaling: float, dropout: float, router: Router, owned: bool
    ) -> None:
        super().__init__()
        self.base_layer = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.leaves, self.scaling, self.dropout = leaves, scaling, dropout
        self.first_row = 0
        """Where in the whole the rows of the next call lie, when they come piece by piece (`model.MLP`)."""
        self.lora_router = router if owned else None
        self._router = (router,)  # in a tuple: a shared one is no child of this layer
        self._served: tuple | None = None
        device = next(iter(linear.state_dict().values())).device
        self.lora_A = nn.Parameter(torch.empty(leaves * r, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, leaves * r, device=device))
        for leaf in self.lora_A.detach().split(r):
            nn.init.kaiming_uniform_(leaf, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        (router,) = self._router
        if self.lora_router is not None:
            router(x)
        rows, routing = x.flatten(0, -2), router.routing
        routed = len(routing.index if isinstance(routing, Leaves) else routing)
        if routed != len(rows):  # a piece of what was routed
            first, count = self.first_row, len(rows)
            routing = routing.rows(first, count) if isinstance(routing, Leaves) else routing[first : first + count]
        if self.training:
            self._served = None
            weights = routing.mask if isinstance(routing, Leaves) else routing
            return LoRATreeFunction.apply(
                x, self.lora_A, self.lora_B, weights, self.scaling, self.dropout, self.base_layer, self.first_row
            )
        output, (A, B) = self.base_layer(rows), self._served_factors(x.dtype)
        if isinstance(routing, Leaves):
            add_leaf_update_(output, rows, A, B, routing, self.scaling)
        else:
            output.addmm_(_weighted(rows @ A.T, routing), B.T, alpha=self.scaling)
        return output.view(*x.shape[:-1], -1)

    def _served_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B in `dtype`; a model that generates keeps them, since rounding all leaves at every token would take
        longer than multiplying with them."""
        # Sharded parameters change without their version telling.
        if not torch.is_inference_mode_enabled() or torch.distributed.is_initialized():
            return self.lora_A.to(dtype), self.lora_B.to(dtype)
        key = (dtype, self.lora_A._version, self.lora_B._version)
        if self._served is None or self._served[0] != key:
            self._served = (key, self.lora_A.detach().to(dtype), self.lora_B.detach().to(dtype))
        return self._served[1:]


class LoRATreeFunction(torch.autograd.Function):
    """Base and mixture of leaves as one function, which saves x, A x and the weights of the leaves.

    As `lora_linear.LoRALinearFunction`, and to the same bits where there is one leaf of weight 1.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        weights: Tensor,
        scaling: float,
        dropout: float,
        linear: nn.Module,
        first_row: int,
    ) -> Tensor:
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        rows = x.flatten(0, -2)
        dropped, ctx.seed = drop(rows, dropout, first_row)
        low = dropped @ A.T  # (rows, leaves * r)
        output = F.linear(rows, dense_weight(linear, x.dtype)).addmm_(_weighted(low, weights), B.T, alpha=scaling)
        ctx.save_for_backward(x, low, lora_A, lora_B, weights)
        ctx.scaling, ctx.dropout, ctx.linear, ctx.first_row = scaling, dropout, linear, first_row
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, low, lora_A, lora_B, weights = ctx.saved_tensors
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        grad_rows, rows = grad_output.flatten(0, -2), x.flatten(0, -2)
        mask = dropout_mask(rows, ctx.dropout, ctx.seed, ctx.first_row) if ctx.dropout else None
        dropped = rows if mask is None else rows * mask
        grad_x = grad_A = grad_B = grad_weights = None
        grad_weighted = (grad_rows @ B).mul_(ctx.scaling)  # (rows, leaves * r)
        grad_low = _weighted(grad_weighted, weights)
        if ctx.needs_input_grad[0]:
            grad_x = grad_rows @ dense_weight(ctx.linear, x.dtype)
            grad_x = grad_x.addmm_(grad_low, A) if mask is None else grad_x.addcmul_(grad_low @ A, mask)
            grad_x = grad_x.view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_A = (grad_low.T @ dropped).to(lora_A.dtype)
        if ctx.needs_input_grad[2]:
            grad_B = (_weighted(low, weights).T @ grad_rows).T.to(lora_B.dtype).mul_(ctx.scaling)
        if ctx.needs_input_grad[3]:
            products = grad_weighted.mul_(low).unflatten(1, (weights.shape[1], -1))
            grad_weights = products.sum(-1, dtype=weights.dtype)
        return grad_x, grad_A, grad_B, grad_weights, None, None, None, None


def _weighted(low: Tensor, weights: Tensor) -> Tensor:
    """low (rows, leaves * r) with the part of each leaf times its weight (rows, leaves), a number or a bool."""
    weights = weights if weights.dtype == torch.bool else weights.to(low.dtype)
    return (low.unflatten(1, (weights.shape[1], -1)) * weights[..., None]).flatten(1)


def add_leaf_update_(
    output: Tensor, rows: Tensor, A: Tensor, B: Tensor, leaves: Leaves, scaling: float, kernel: Kernel | None = None
) -> Tensor:
    """Add scaling * B_l A_l x with the leaf l of each row to `output`, by one of three kernels with the same result.

    mask: all leaves at once, those not taken times 0; gather: each row with a copy of its leaf (as BGMV of Punica, Chen
    et al. 2023, arXiv 2310.18547); segment: rows ordered by leaf, a product for each (SGMV).

    Args:
        output: (rows, out).
        rows: (rows, in).
        A, B: (leaves * r, in) and (out, leaves * r), in the dtype of the rows.
        kernel: None: `cheapest_kernel`.
    """
    kernel = kernel or cheapest_kernel(len(rows), leaves.count, len(A))
    if kernel == "mask":
        return output.addmm_(_weighted(rows @ A.T, leaves.mask), B.T, alpha=scaling)
    A = A.unflatten(0, (leaves.count, -1))  # (leaves, r, in)
    B = B.unflatten(1, (leaves.count, -1)).transpose(0, 1)  # (leaves, out, r)
    if kernel == "gather":
        low = torch.bmm(A[leaves.index], rows[..., None])
        output[..., None].baddbmm_(B[leaves.index], low, alpha=scaling)
        return output
    order, sizes = leaves.segments
    pieces = rows[order].split(sizes)
    ordered = torch.cat([piece @ A[leaf].T @ B[leaf].T for leaf, piece in enumerate(pieces)])
    return output.index_add_(0, order, ordered, alpha=scaling)


def cheapest_kernel(rows: int, leaves: int, ranks: int) -> Kernel:
    """The kernel that moves and multiplies least for so many rows; `ranks` are those of all leaves.

    Up to 256 ranks mask is a small LoRA: nothing is looked up, nothing waits for the device, and a row's result does
    not depend on how many others there are. Above, a few rows gather their leaves, which is less to read than all of
    them; many rows go leaf by leaf.
    """
    if ranks <= _MASKED_RANKS:
        return "mask"
    return "gather" if _GATHER_COPIES * rows < leaves else "segment"
