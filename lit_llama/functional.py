"""The hot path of training as autograd functions that save little and compute what the backward needs again.

Each is a plain PyTorch formula with a hand-written derivative, so that it runs on CPU, CUDA and MPS alike. Against
autograd's own derivative they keep no fp32 copies and no (length x length) scores. Lives here: normalisation, SwiGLU,
rotation, attention. Not here: the model (`model.py`), LoRA's product (`lora_linear.py`), the loss (`loss.py`).
"""

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

QUERY_BLOCK = 128
"""Queries whose scores exist at one time: few enough to stay in cache, enough for full speed of the products."""

ROW_BLOCK = 256
"""Tokens by which dropout is drawn and the pieces of a sequence are cut, so that the ones fit the others."""


class recomputed(torch.autograd.graph.saved_tensors_hooks):  # noqa: N801, used like a function
    """Within this context, whatever is saved of `output` for a backward is not kept but made again by `make`.

    For outputs that are cheap to make from what is kept anyway; `make` must give the same numbers. Hooks of this kind
    outside do not see what is saved inside: only the innermost are called.
    """

    def __init__(self, output: Tensor, make: Callable[[], Tensor]) -> None:
        address, size = output.data_ptr(), output.numel()
        made: Tensor | None = None
        saved = asked_for = 0

        def pack(tensor: Tensor) -> Tensor | torch.Size:
            nonlocal saved
            if tensor.data_ptr() != address or tensor.numel() != size:
                return tensor
            saved += 1
            return tensor.shape

        def unpack(packed: Tensor | torch.Size) -> Tensor:
            nonlocal made, asked_for
            if isinstance(packed, Tensor):
                return packed
            result = (make() if made is None else made).view(packed)
            asked_for += 1
            made = None if asked_for % saved == 0 else result  # until the last of those that saved it
            return result

        super().__init__(pack, unpack)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm in fp32 (Zhang & Sennrich 2019, arXiv 1910.07467), cast back before the weight.

    Returns:
        (normalised x, the factor (..., 1) in fp32 that each row was scaled by).
    """
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x32 * scale).to(x.dtype) * weight, scale


class RMSNormFunction(torch.autograd.Function):
    """`rms_norm` with a derivative that keeps no fp32 copy of x."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.to(scale.dtype) * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_output * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = grad_output.to(scale.dtype) * weight.to(scale.dtype)
        projection = (grad_normed * normed).mean(-1, keepdim=True)
        return grad_normed.addcmul_(normed, projection, value=-1).mul_(scale).to(x.dtype), grad_weight, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, without a gradient; see `SwiGLUFunction`."""
    return F.silu(gate).mul_(up)


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202), saving its two inputs only."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad_output * up, gate)
        return grad_gate, F.silu(gate).mul_(grad_output)


class RotateFunction(torch.autograd.Function):
    """Rotary position embedding in the half-split layout of Hugging Face (Su et al. 2021, arXiv 2104.09864).

    x is (batch, heads, length, head_dim) in any memory order, the result contiguous; cos and sin are (batch or 1, 1,
    length, head_dim) in x's dtype, sin's first half negated (see `model.LlamaModel.rotary_tables`).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        rotated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return torch.mul(x, cos, out=rotated).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        turned = (grad_output * sin).roll(grad_output.shape[-1] // 2, dims=-1)
        return turned.addcmul_(grad_output, cos), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `RotateFunction`."""
    return RotateFunction.apply(x, cos, sin)


class CausalMask:
    """What the queries of one forward pass may see, worked out once for all layers.

    Key j is visible to query i when j <= i, j > i - sliding_window, and both lie in the same document. In front of the
    sequence's own keys there may be `prefix` others, which every query sees.
    """

    def __init__(
        self,
        length: int,
        document_ids: Tensor | None,
        sliding_window: int | None,
        device: torch.device,
        prefix: int = 0,
    ) -> None:
        self.length = length
        self.device = device
        self.document_ids = document_ids  # (batch, length); documents are contiguous
        self.sliding_window = sliding_window if sliding_window is not None and sliding_window < length else None
        self.prefix = prefix
        self._behind: dict[int, CausalMask] = {}

    def behind(self, prefix: int) -> "CausalMask":
        """This mask with so many keys in front; made once for all layers."""
        if prefix not in self._behind:
            self._behind[prefix] = CausalMask(self.length, self.document_ids, self.sliding_window, self.device, prefix)
        return self._behind[prefix]

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
        """True where a query must not look: (batch or 1, 1, queries start..end, prefix and keys first_key..end)."""
        queries = torch.arange(start, end, device=self.device)[:, None]
        keys = torch.arange(first_key, end, device=self.device)
        hidden = (keys > queries)[None]
        if self.sliding_window is not None:
            hidden = hidden | (keys <= queries - self.sliding_window)
        if self.document_ids is not None:
            hidden = hidden | (self.document_ids[:, start:end, None] != self.document_ids[:, None, first_key:end])
        if self.prefix:
            hidden = F.pad(hidden, (self.prefix, 0))
        return hidden[:, None]

    @property
    def hides_only_what_follows(self) -> bool:
        """Whether a query sees every key up to its own."""
        return self.document_ids is None and self.sliding_window is None

    @property
    def is_causal_only(self) -> bool:
        """Whether plain causality is all there is."""
        return self.hides_only_what_follows and not self.prefix

    @cached_property
    def dense(self) -> Tensor:
        """The whole mask, True where visible: (batch or 1, 1, length, prefix + length)."""
        return ~self.hidden(0, 0, self.length)

    @cached_property
    def sparse(self) -> Any:
        """The mask for flex attention (a BlockMask), which skips blocks of it that are hidden as a whole."""
        from torch.nn.attention.flex_attention import create_block_mask  # its import takes seconds

        documents, window, prefix = self.document_ids, self.sliding_window, self.prefix
        of_keys = F.pad(documents, (prefix, 0)) if documents is not None and prefix else documents

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            result = key <= query + prefix
            if window is not None:
                result = result & (key > query + prefix - window)
            if documents is not None:
                result = result & (documents[batch, query] == of_keys[batch, key])
            return result | (key < prefix) if prefix else result

        rows = None if documents is None else len(documents)
        return create_block_mask(visible, rows, None, self.length, prefix + self.length, device=self.device)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CausalMask | Tensor | None,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal grouped-query attention of a sequence over itself, or over a cache (`cached_attention`).

    On CPU by blocks (`AttentionFunction`); on CUDA flex attention where documents or a window are to be kept apart,
    which never computes what lies outside; else, and on other devices, `scaled_dot_product_attention`.

    Args:
        query: (batch, heads, length, head_dim).
        key, value: (batch, kv_heads, length, head_dim); of a cache, all that it holds.
        mask: a `CausalMask`; of a cache, what `KVCache.mask` is.
        prefix: (kv_heads, prefix, head_dim) each, keys and values that every query sees besides, whatever its document
            and window: one softmax over all.

    Returns:
        (batch, heads, length, head_dim).
    """
    if not isinstance(mask, CausalMask):
        return cached_attention(query, key, value, mask, prefix)
    if prefix is not None:
        mask = mask.behind(prefix[0].shape[1])
        key, value = (
            torch.cat((front.expand(len(own), -1, -1, -1), own), dim=2)
            for front, own in zip(prefix, (key, value), strict=True)
        )
    if query.device.type == "cpu":
        return AttentionFunction.apply(query, key, value, mask)
    if mask.is_causal_only:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    if query.device.type == "cuda":
        return _compiled_flex_attention()(query, key, value, block_mask=mask.sparse, enable_gqa=True)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense, enable_gqa=True)


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention  # its import takes seconds

    return torch.compile(flex_attention, dynamic=False)


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, prefix: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Attention of new queries over the keys and values of a cache (inference).

    Args:
        query: (batch, heads, new, head_dim).
        key, value: (batch, kv_heads, cached, head_dim), the new tokens' own included.
        mask: (batch or 1, 1, new, cached), -inf where a query must not look, else 0; None: everything is visible.
        prefix: see `attention`.

    Returns:
        (batch, heads, new, head_dim).
    """
    batch, heads, new, head_dim = query.shape
    kv_heads, cached = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, -1, new, head_dim)
    if new == 1 and prefix is None:
        # The heads of a group take the place of queries, so their keys are read once; and unlike the matrix product
        # below, this kernel is not built anew for each cached length.
        return F.scaled_dot_product_attention(grouped[:, :, :, 0], key, value, attn_mask=mask).view(query.shape)
    output = torch.empty_like(grouped)
    blocks = (
        [(start, min(start + QUERY_BLOCK, new)) for start in range(0, new, QUERY_BLOCK)] if new > QUERY_BLOCK else []
    )
    for start, end in blocks or [(0, new)]:  # of a step's few tokens, whose number may be a symbol of compiled code
        seen = cached - new + end  # no query of the block is further on
        block = grouped[:, :, :, start:end].reshape(batch, kv_heads, -1, head_dim)
        scores = (block @ key[:, :, :seen].transpose(-1, -2)).mul_(head_dim**-0.5)
        if mask is not None:
            scores.view(batch, kv_heads, -1, end - start, seen).add_(mask[:, None, :, start:end, :seen])
        if prefix is None:
            mixed = torch.softmax(scores, dim=-1) @ value[:, :, :seen]
        else:
            # Behind the others, whose places in the softmax kernel are then those they have without it.
            in_front = (block @ prefix[0].transpose(-1, -2)).mul_(head_dim**-0.5)
            weights = torch.softmax(torch.cat((scores, in_front), dim=-1), dim=-1)
            mixed = weights[..., :seen] @ value[:, :, :seen] + weights[..., seen:] @ prefix[1]
        output[:, :, :, start:end] = mixed.view(output[:, :, :, start:end].shape)
    return output.view(query.shape)


class AttentionFunction(torch.autograd.Function):
    """Causal grouped-query attention by blocks of queries; scores are computed again in the backward.

    A block of queries meets only the keys from the earliest it may see to its own end, so half the work of causality,
    everything outside a sliding window and most of the other documents in a packed window is never computed. On CPU
    this is several times as fast as `scaled_dot_product_attention`, forward and backward together.

    The output lies in memory as (batch, length, heads, head_dim), as the projection behind it wants to read it.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,  # (batch, heads, length, head_dim)
        key: Tensor,  # (batch, kv_heads, mask.prefix + length, head_dim)
        value: Tensor,
        mask: CausalMask,
    ) -> Tensor:
        batch, heads, length, head_dim = query.shape
        output = torch.empty(batch, length, heads, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)
        grouped, grouped_output = _grouped(query, key), _grouped(output, key)
        keys, values = key.flatten(0, 1), value.flatten(0, 1)  # (batch * kv_heads, mask.prefix + length, head_dim)
        for first_key, start, end in mask.query_blocks:
            weights = _attention_weights(grouped, keys, mask, first_key, start, end)
            block = grouped_output[:, :, :, start:end]
            block.copy_((weights @ _seen(values, mask, first_key, end)).view(block.shape))
        ctx.save_for_backward(query, key, value, output)
        ctx.mask = mask
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(keys), torch.zeros_like(values)
        # dS = P * (dP - rowsum(P * dP)), and rowsum(P * dP) = rowsum(dO * O) (Dao et al. 2022, arXiv 2205.14135)
        delta = _grouped((grad_output * output).sum(-1, keepdim=True), key)
        grouped, grad_grouped, grad_output = (_grouped(x, key) for x in (query, grad_query, grad_output))
        for first_key, start, end in ctx.mask.query_blocks:
            seen = (ctx.mask, first_key, end)
            weights = _attention_weights(grouped, keys, ctx.mask, first_key, start, end)
            grad_rows = _rows(grad_output, start, end)
            _add_product_(grad_value, weights, grad_rows, *seen)
            grad_scores = grad_rows @ _seen(values, *seen).transpose(1, 2)
            grad_scores.sub_(_rows(delta, start, end)).mul_(weights)
            _add_product_(grad_key, grad_scores, _rows(grouped, start, end), *seen, scale=scale)
            block = grad_grouped[:, :, :, start:end]
            block.copy_((grad_scores @ _seen(keys, *seen)).mul_(scale).view(block.shape))
        return grad_query, grad_key.view(key.shape), grad_value.view(value.shape), None


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """(batch, heads, length, n) as (batch, kv_heads, group, length, n): a view."""
    return x.unflatten(1, (key.shape[1], -1))


def _rows(grouped: Tensor, start: int, end: int) -> Tensor:
    """Queries start..end, those of a group below each other: (batch * kv_heads, group * (end - start), n), a copy."""
    return grouped[:, :, :, start:end].flatten(2, 3).flatten(0, 1)


def _seen(keys: Tensor, mask: CausalMask, first_key: int, end: int) -> Tensor:
    """What a block of queries meets of keys or values (batch * kv_heads, prefix + length, n)."""
    own = keys[:, mask.prefix + first_key : mask.prefix + end]
    return torch.cat((keys[:, : mask.prefix], own), dim=1) if mask.prefix else own


def _add_product_(
    total: Tensor, weights: Tensor, rows: Tensor, mask: CausalMask, first_key: int, end: int, scale: float = 1.0
) -> None:
    """Add scale * weights^T @ rows to the part of `total` that `_seen` picks."""
    if mask.prefix:
        total[:, : mask.prefix].baddbmm_(weights[:, :, : mask.prefix].transpose(1, 2), rows, alpha=scale)
        weights = weights[:, :, mask.prefix :]
    total[:, mask.prefix + first_key : mask.prefix + end].baddbmm_(weights.transpose(1, 2), rows, alpha=scale)


def _attention_weights(grouped: Tensor, keys: Tensor, mask: CausalMask, first_key: int, start: int, end: int) -> Tensor:
    """softmax(QK^T / sqrt(head_dim)) of a block: (batch * kv_heads, group * (end - start), prefix + keys to it)."""
    rows, keys_seen = _rows(grouped, start, end), _seen(keys, mask, first_key, end).transpose(1, 2)
    scale = keys.shape[-1] ** -0.5
    if mask.hides_only_what_follows:
        # Then it is only among a block's own keys that any are hidden.
        scores = keys.new_empty(len(rows), rows.shape[1], keys_seen.shape[2])
        scores.baddbmm_(rows, keys_seen, beta=0, alpha=scale)
        following = _bias(mask.hidden(start, start, end)[..., mask.prefix :], keys.dtype)[:, 0]
        scores.unflatten(1, (-1, end - start))[..., start - end :].add_(following)
    else:
        # The scores start as the mask, and the product is added onto it: two passes over them less.
        bias = _bias(mask.hidden(first_key, start, end), keys.dtype)[:, None]
        scores = bias.expand(*grouped.shape[:3], -1, -1).flatten(2, 3).flatten(0, 1).contiguous()
        scores.baddbmm_(rows, keys_seen, alpha=scale)
    return torch.softmax(scores, dim=-1)


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where hidden, else 0."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
