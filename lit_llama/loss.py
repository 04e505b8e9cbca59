"""Cross-entropy from hidden states: the head's logits exist for one chunk of tokens at a time, and never as a whole.

For a vocabulary of 128 k, the logits of 4,096 tokens are 2 GB in fp32, and a plain loss keeps several copies. Here
the loss walks over chunks of target tokens; where a gradient will be wanted it is computed in the same pass, because
it needs the same logits, and only its (tokens, hidden) result is kept.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

IGNORE_INDEX = -100
"""Label of a position that is not a target."""

# Logit elements alive at one time. On CPU a chunk's fp32 logits should stay near the last-level cache.
_CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T) against labels.

    Args:
        hidden: (..., hidden_size) normalised hidden states.
        weight: (vocab, hidden_size), the head. Its gradient is computed when it requires one.
        labels: (...) int64, already shifted: the target of each position; `IGNORE_INDEX` where there is none. Ignored
            positions are dropped before the matrix product.
        reduction: "mean" over targets or "sum".
        chunk_tokens: targets whose logits exist at one time; by default as many as suit the device.

    Returns:
        fp32 scalar (fp64 for fp64 input). With no target at all: 0.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    targets = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    if len(targets) != len(labels):
        hidden, labels = hidden[targets], labels[targets]
    if chunk_tokens is None:
        chunk_tokens = max(32, _CHUNK_ELEMENTS.get(hidden.device.type, 2**25) // weight.shape[0])
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss = LinearCrossEntropyFunction.apply(hidden, weight, labels, chunk_tokens, with_gradient)
    return loss / max(1, len(labels)) if reduction == "mean" else loss


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Summed loss; see `linear_cross_entropy`.

    With e = exp(logits - max) and s = sum(e), the gradient of the logits is e / s - onehot(label). Both its products
    are taken with the unnormalised e, and the division goes to the small side: one pass over the logits less.

        d hidden = (e @ W) / s - W[label]
        d W      = e.T @ (hidden / s) - sum over targets of onehot(label).T @ hidden
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int, with_gradient: bool
    ) -> Tensor:
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=accumulate, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_gradient and ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros(weight.shape, dtype=accumulate, device=weight.device)
            if with_gradient and ctx.needs_input_grad[1]
            else None
        )
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            h, label = hidden[chunk], labels[chunk, None]
            logits = (h @ weight.T).to(accumulate)  # (chunk, vocab)
            target_logit = logits.gather(1, label)
            largest = logits.amax(dim=1, keepdim=True)
            exponentials = logits.sub_(largest).exp_()
            total = exponentials.sum(dim=1, keepdim=True)
            loss += (largest + total.log() - target_logit).sum()
            if grad_hidden is not None or grad_weight is not None:
                exponentials = exponentials.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = (exponentials @ weight) / total - weight[label.squeeze(1)]
            if grad_weight is not None:
                grad_weight += exponentials.T @ (h / total).to(h.dtype)
                grad_weight.index_add_(0, label.squeeze(1), h.to(accumulate), alpha=-1)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_output).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_output).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None
