"""The hot path of training as autograd functions that save little and compute what the backward needs again.

Each is a plain PyTorch formula with a hand-written derivative, so that it runs on CPU, CUDA and MPS alike. Against
autograd's own derivative they keep no fp32 copies and no (length x length) scores. Lives here: normalisation, SwiGLU,
rotation, attention. Not here: the model (`model.py`), LoRA's product (`lora.py`), the loss (`loss.py`).
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

QUERY_BLOCK = 128
"""Queries whose scores exist at one time: few enough to stay in cache, enough for full speed of the products."""


class RMSNormFunction(torch.autograd.Function):
    """Root-mean-square norm in fp32 (Zhang & Sennrich 2019, arXiv 1910.07467), cast back before the weight."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale  # fp32: the scale is
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_output * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = (grad_output * weight).to(normed.dtype)
        projection = (grad_normed * normed).mean(-1, keepdim=True)
        return (grad_normed.sub_(normed.mul_(projection)).mul_(scale)).to(x.dtype), grad_weight, None


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202), saving its two inputs only."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad_output * up, gate)
        return grad_gate, F.silu(gate).mul_(grad_output)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout of Hugging Face (Su et al. 2021, arXiv 2104.09864).

    Args:
        x: (batch, heads, length, head_dim).
        cos, sin: (batch or 1, 1, length, head_dim), in x's dtype; sin's first half is negated (see `rotary_tables`).
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class CausalMask:
    """What the queries of one forward pass may see, worked out once for all layers.

    Key j is visible to query i when j <= i, j > i - sliding_window, and both lie in the same document.
    """

    def __init__(
        self, length: int, document_ids: Tensor | None, sliding_window: int | None, device: torch.device
    ) -> None:
        self.length = length
        self.device = device
        self.document_ids = document_ids  # (batch, length); documents are contiguous
        self.sliding_window = sliding_window if sliding_window is not None and sliding_window < length else None

    @cached_property
    def query_blocks(self) -> list[tuple[int, int, int]]:
        """[(first_key, start, end)]: the queries start..end see no key before first_key, in any row of the batch."""
        first_keys = [0] * self.length
        if self.document_ids is not None:
            changed = torch.ones_like(self.document_ids, dtype=torch.bool)
            changed[:, 1:] = self.document_ids[:, 1:] != self.document_ids[:, :-1]
            positions = torch.arange(self.length, device=self.device)
            first_keys = torch.where(changed, positions, 0).cummax(dim=1).values.amin(dim=0).tolist()
        window = self.sliding_window or self.length
        return [
            (max(first_keys[start], start - window + 1), start, min(start + QUERY_BLOCK, self.length))
            for start in range(0, self.length, QUERY_BLOCK)
        ]

    def hidden(self, first_key: int, start: int, end: int) -> Tensor:
        """True where a query must not look: (batch or 1, 1, queries start..end, keys first_key..end)."""
        queries = torch.arange(start, end, device=self.device)[:, None]
        keys = torch.arange(first_key, end, device=self.device)
        hidden = (keys > queries)[None]
        if self.sliding_window is not None:
            hidden = hidden | (keys <= queries - self.sliding_window)
        if self.document_ids is not None:
            hidden = hidden | (self.document_ids[:, start:end, None] != self.document_ids[:, None, first_key:end])
        return hidden[:, None]

    @cached_property
    def dense(self) -> Tensor | None:
        """The whole mask for kernels that take one, True where visible; None where plain causality is all there is."""
        if self.document_ids is None and self.sliding_window is None:
            return None
        return ~self.hidden(0, 0, self.length)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: CausalMask) -> Tensor:
    """Causal grouped-query attention of a sequence over itself.

    Args:
        query: (batch, heads, length, head_dim).
        key, value: (batch, kv_heads, length, head_dim).

    Returns:
        (batch, heads, length, head_dim).
    """
    if query.device.type == "cpu":
        return AttentionFunction.apply(query, key, value, mask)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask.dense, is_causal=mask.dense is None, enable_gqa=True
    )


def cached_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of new queries over the keys and values of a cache (inference).

    Args:
        query: (batch, heads, new, head_dim).
        key, value: (batch, kv_heads, cached, head_dim), the new tokens' own included.
        mask: (batch or 1, 1, new, cached), -inf where a query must not look, else 0; None: everything is visible.

    Returns:
        (batch, heads, new, head_dim).
    """
    batch, heads, new, head_dim = query.shape
    kv_heads, cached = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, -1, new, head_dim)
    if new == 1:
        # The heads of a group take the place of queries, so their keys are read once; and unlike the matrix product
        # below, this kernel is not built anew for each cached length.
        return F.scaled_dot_product_attention(grouped[:, :, :, 0], key, value, attn_mask=mask).view(query.shape)
    output = torch.empty_like(grouped)
    for start in range(0, new, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, new)
        seen = cached - new + end  # no query of the block is further on
        block = grouped[:, :, :, start:end].reshape(batch, kv_heads, -1, head_dim)
        scores = (block @ key[:, :, :seen].transpose(-1, -2)).mul_(head_dim**-0.5)
        if mask is not None:
            scores.view(batch, kv_heads, -1, end - start, seen).add_(mask[:, None, :, start:end, :seen])
        mixed = torch.softmax(scores, dim=-1) @ value[:, :, :seen]
        output[:, :, :, start:end] = mixed.view(output[:, :, :, start:end].shape)
    return output.view(query.shape)


class AttentionFunction(torch.autograd.Function):
    """Causal grouped-query attention by blocks of queries; scores are computed again in the backward.

    A block of queries meets only the keys from the earliest it may see to its own end, so half the work of causality,
    everything outside a sliding window and most of the other documents in a packed window is never computed. On CPU
    this is about three times as fast as `scaled_dot_product_attention`, forward and backward together.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,  # (batch, heads, length, head_dim)
        key: Tensor,  # (batch, kv_heads, length, head_dim)
        value: Tensor,
        mask: CausalMask,
    ) -> Tensor:
        batch, kv_heads, length, head_dim = key.shape
        grouped = query.view(batch, kv_heads, -1, length, head_dim)
        output = torch.empty_like(grouped)
        for first_key, start, end in mask.query_blocks:
            weights = _attention_weights(grouped, key, mask, first_key, start, end)
            output[:, :, :, start:end] = (weights @ value[:, :, first_key:end]).view(output[:, :, :, start:end].shape)
        ctx.save_for_backward(query, key, value, output)
        ctx.mask = mask
        return output.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        batch, kv_heads, length, head_dim = key.shape
        grouped = query.view(batch, kv_heads, -1, length, head_dim)
        grad_output = grad_output.reshape(grouped.shape)
        grad_query = torch.empty_like(grouped)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        # dS = P * (dP - rowsum(P * dP)), and rowsum(P * dP) = rowsum(dO * O) (Dao et al. 2022, arXiv 2205.14135)
        delta = (grad_output * output).sum(-1, keepdim=True)
        for first_key, start, end in ctx.mask.query_blocks:
            keys = slice(first_key, end)
            weights = _attention_weights(grouped, key, ctx.mask, first_key, start, end)
            rows = (batch, kv_heads, weights.shape[2], -1)
            grad_block = grad_output[:, :, :, start:end].reshape(rows)
            grad_value[:, :, keys] += weights.transpose(-1, -2) @ grad_block
            grad_scores = grad_block @ value[:, :, keys].transpose(-1, -2)
            grad_scores.sub_(delta[:, :, :, start:end].reshape(rows)).mul_(weights).mul_(head_dim**-0.5)
            grad_query[:, :, :, start:end] = (grad_scores @ key[:, :, keys]).view(grad_query[:, :, :, start:end].shape)
            grad_key[:, :, keys] += grad_scores.transpose(-1, -2) @ grouped[:, :, :, start:end].reshape(rows)
        return grad_query.view(query.shape), grad_key, grad_value, None


def _attention_weights(grouped: Tensor, key: Tensor, mask: CausalMask, first_key: int, start: int, end: int) -> Tensor:
    """softmax(QK^T / sqrt(head_dim)) of a block: (batch, kv_heads, group * (end - start), end - first_key)."""
    batch, kv_heads, group, _, head_dim = grouped.shape
    queries = grouped[:, :, :, start:end].reshape(batch, kv_heads, group * (end - start), head_dim)
    scores = (queries @ key[:, :, first_key:end].transpose(-1, -2)).mul_(head_dim**-0.5)
    hidden = mask.hidden(first_key, start, end)
    scores.view(batch, kv_heads, group, end - start, end - first_key).masked_fill_(hidden[:, None], float("-inf"))
    return torch.softmax(scores, dim=-1)
