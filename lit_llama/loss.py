"""Cross-entropy from hidden states: the head's logits exist for one chunk of tokens at a time, and never as a whole.

For a vocabulary of 128 k, the logits of 4,096 tokens are 2 GB in fp32, and a plain loss keeps several copies. Here
the loss walks over chunks of target tokens; where a gradient will be wanted it is computed in the same pass, because
it needs the same logits, and only its (tokens, hidden) result is kept.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lit_llama.quantization import QuantizedLinear

IGNORE_INDEX = -100
"""Label of a position that is not a target."""

# Logits alive at one time (in the dtype of the hidden states): enough tokens for full speed of the products.
_CHUNK_ELEMENTS = {"cpu": 3 * 2**22, "cuda": 2**26}
# Of these, how many at one time in fp32; on CPU as many as stay in cache.
_SOFTMAX_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}


def chunk_sizes(device_type: str, vocab: int) -> tuple[int, int]:
    """Target tokens whose logits exist at one time, and of these how many in fp32."""
    return (
        max(32, _CHUNK_ELEMENTS.get(device_type, 2**25) // vocab),
        max(1, _SOFTMAX_ELEMENTS.get(device_type, 2**24) // vocab),
    )


def head_loss(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    reduction: str = "mean",
    targets: Tensor | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The loss through whatever the model's head is: a linear layer, a quantized one, either of them under LoRA.

    Args:
        head: `model.lm_head`.
        hidden, labels, reduction, targets, teacher: see `linear_cross_entropy`.
    """
    base = getattr(head, "linear", head)
    update = None if base is head else (head.lora_A, head.lora_B, head.scaling)
    weight = base if isinstance(base, QuantizedLinear) else base.weight
    return linear_cross_entropy(hidden, weight, labels, reduction, update=update, targets=targets, teacher=teacher)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | QuantizedLinear,
    labels: Tensor,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    update: tuple[Tensor, Tensor, float] | None = None,
    targets: Tensor | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T) against labels, or its divergence from a teacher's probabilities.

    Args:
        hidden: (..., hidden_size) normalised hidden states.
        weight: (vocab, hidden_size), the head. Its gradient is computed when it requires one. A quantized head is made
            dense a few thousand rows at a time.
        labels: (...) int64, already shifted: the target of each position; `IGNORE_INDEX` where there is none. Ignored
            positions are dropped before the matrix product.
        reduction: "mean" over targets or "sum".
        chunk_tokens: targets whose logits exist at one time; by default as many as suit the device.
        update: LoRA on the head, (A (r, hidden_size), B (vocab, r), scaling): the weight is then W + scaling * B A.
        targets: (n,) int64, the flat positions whose label is not `IGNORE_INDEX`. Finding them here makes the host wait
            for a GPU.
        teacher: (ids (n, k) int64, probabilities (n, k)) of each target, which take the place of its label: the loss is
            then KL(teacher || softmax), with the teacher's other tokens at 0. A row of one probability 1 is a label.

    Returns:
        fp32 scalar (fp64 for fp64 input). With no target at all: 0.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    if targets is None:
        targets = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    if len(targets) != len(labels):
        hidden, labels = hidden[targets], labels[targets]
    ids, probabilities = teacher or (labels[:, None], None)
    if chunk_tokens is None:
        vocab = weight.out_features if isinstance(weight, QuantizedLinear) else weight.shape[0]
        chunk_tokens, _ = chunk_sizes(hidden.device.type, vocab)
    lora_A, lora_B, scaling = update or (None, None, 0.0)
    learning = any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (hidden, weight, lora_A, lora_B))
    loss = LinearCrossEntropyFunction.apply(
        hidden, weight, lora_A, lora_B, scaling, ids, probabilities, chunk_tokens, learning and torch.is_grad_enabled()
    )
    return loss / max(1, len(ids)) if reduction == "mean" else loss


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Summed loss and, in the same pass, its gradients; see `linear_cross_entropy`.

    With p = softmax(logits) and q the target probabilities (1 at a label), the gradient of the logits is d = p - q. It
    takes the place of the logits in memory.

        d hidden = d @ W + scaling * d_low @ A    where d_low = d @ B
        d W      = d.T @ hidden
        d B      = scaling * d.T @ low            where low = hidden @ A.T
        d A      = scaling * d_low.T @ hidden
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor | QuantizedLinear,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        ids: Tensor,
        probabilities: Tensor | None,
        chunk_tokens: int,
        with_gradient: bool,
    ) -> Tensor:
        dtype, accumulate = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
        trained = (hidden, weight, lora_A, lora_B)
        grads = [
            torch.zeros(tensor.shape, dtype=accumulate, device=hidden.device) if with_gradient and needed else None
            for tensor, needed in zip(trained, ctx.needs_input_grad, strict=False)
        ]
        grad_hidden, grad_weight, grad_A, grad_B = grads
        if grad_hidden is not None:
            grad_hidden = grads[0] = torch.empty_like(hidden)
        if lora_A is not None:
            A, B = lora_A.to(dtype), lora_B.to(dtype)

        loss = torch.zeros((), dtype=accumulate, device=hidden.device)
        vocab = weight.out_features if isinstance(weight, QuantizedLinear) else weight.shape[0]
        # Reused by all chunks: memory of this size, freed and asked for again, comes back from the system page by page.
        buffer = torch.empty(min(chunk_tokens, len(hidden)), vocab, dtype=dtype, device=hidden.device)
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            h, target = hidden[chunk], ids[chunk]
            logits = buffer[: len(h)]
            for part, dense in _dense_rows(weight, dtype):
                torch.mm(h, dense.T, out=logits[:, part])
            if lora_A is not None:
                low = h @ A.T  # (chunk, r)
                logits.addmm_(low, B.T, alpha=scaling)
            at_targets = logits.gather(1, target).to(accumulate)
            q = torch.ones_like(at_targets) if probabilities is None else probabilities[chunk].to(accumulate)
            loss += (q * (_log_or_zero(q) - at_targets)).sum()
            loss += (q.sum(1) * _softmax_(logits, accumulate)).sum()
            # scatter_add_ would convert all of bf16 logits to fp32 and back on a CPU.
            rows = torch.arange(len(h), device=h.device)[:, None]
            d = logits.index_put_((rows, target), -q.to(dtype), accumulate=True)
            if grad_hidden is not None:
                grad_hidden[chunk] = _times(d, weight)
            if lora_A is not None:
                grad_low = (d @ B).mul_(scaling)  # (chunk, r)
                if grad_hidden is not None:
                    grad_hidden[chunk].addmm_(grad_low, A)
                if grad_A is not None:
                    grad_A += grad_low.T @ h
                if grad_B is not None:
                    grad_B.add_(d.T @ low, alpha=scaling)
            if grad_weight is not None:
                grad_weight += d.T @ h
        ctx.save_for_backward(*grads)
        ctx.dtypes = [tensor.dtype if isinstance(tensor, Tensor) else None for tensor in trained]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else (grad * grad_output).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None, None


def _log_or_zero(q: Tensor) -> Tensor:
    """log q, and 0 where q is 0, since q log q goes to 0 there."""
    return torch.where(q > 0, q, 1).log()


def _softmax_(logits: Tensor, accumulate: torch.dtype) -> Tensor:
    """Replace logits (tokens, vocab) by their softmax, worked out in `accumulate`; returns logsumexp (tokens,)."""
    tokens, vocab = logits.shape
    _, rows = chunk_sizes(logits.device.type, vocab)
    buffer = torch.empty(min(rows, tokens), vocab, dtype=accumulate, device=logits.device)
    logsumexp = torch.empty(tokens, dtype=accumulate, device=logits.device)
    for start in range(0, tokens, rows):
        block = logits[start : start + rows]
        largest = block.amax(dim=1).to(accumulate)
        probabilities = torch.softmax(block, dim=1, dtype=accumulate, out=buffer[: len(block)])
        # The largest logit's probability is exp(largest - logsumexp): it cannot underflow.
        logsumexp[start : start + rows] = largest - probabilities.amax(dim=1).log()
        block.copy_(probabilities)
    return logsumexp


def _dense_rows(weight: Tensor | QuantizedLinear, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, dense weight of these rows) of the head: at once, or piece by piece when it is quantized."""
    if isinstance(weight, Tensor):
        yield slice(0, weight.shape[0]), weight
    else:
        yield from weight.dense_pieces(dtype)


def _times(d: Tensor, weight: Tensor | QuantizedLinear) -> Tensor:
    """d @ weight, (chunk, hidden)."""
    if isinstance(weight, Tensor):
        return d @ weight
    pieces = _dense_rows(weight, d.dtype)
    part, dense = next(pieces)
    product = d[:, part] @ dense
    for part, dense in pieces:
        product.addmm_(d[:, part], dense)
    return product
