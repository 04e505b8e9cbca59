"""How likely a model holds continuations of a context: what multiple choice and the harness's tasks are scored by."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_llama.generation import PREFILL_TOKENS
from lit_llama.loss import chunk_sizes
from lit_llama.model import KVCache, Llama


class Likelihood(NamedTuple):
    """Of one continuation behind its context."""

    log_likelihood: float
    """In nats, summed over the tokens."""
    tokens: int
    greedy: bool
    """Whether greedy generation would say exactly this."""


@torch.no_grad()
def continuation_likelihoods(
    model: Llama, contexts: Sequence[list[int]], continuations: Sequence[Sequence[list[int]]]
) -> list[list[Likelihood]]:
    """The likelihoods of each context's continuations.

    The contexts are run once, padded on the left; each continuation then goes on from their cache, which is wound back.

    Args:
        model: in eval mode.
        contexts: ids of each, at least one.
        continuations: those of each context, of at least one id.

    Raises:
        InputError: the longest context with the longest continuation, but for its last token, exceeds the model's
            context.
    """
    device, dtype = model.model.norm.weight.device, model.model.norm.weight.dtype
    width = max(map(len, contexts))
    longest = max(len(ids) for of_context in continuations for ids in of_context)
    padding = torch.tensor([width - len(ids) for ids in contexts], device=device)
    cache = KVCache(model.config, len(contexts), width + longest - 1, dtype, device, padding)
    context_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in contexts], device=device)
    for chunk in context_ids.chunk(-(-context_ids.numel() // PREFILL_TOKENS), dim=1):
        last_hidden = model.model(chunk, cache=cache)[:, -1:]

    results: list[list[Likelihood]] = [[] for _ in contexts]
    for number in range(max(map(len, continuations))):
        rows = [of_context[number] if number < len(of_context) else [] for of_context in continuations]
        lengths = [len(ids) for ids in rows]
        targets = torch.tensor([ids + [0] * (max(lengths) - len(ids)) for ids in rows], device=device)
        hidden = last_hidden
        if max(lengths) > 1:
            hidden = torch.cat((last_hidden, model.model(targets[:, :-1], cache=cache)), dim=1)
            cache.length = width
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        scores, likeliest = _score_tokens(model, hidden[real], targets[real])
        of_rows = zip(results, lengths, scores.split(lengths), likeliest.split(lengths), strict=True)
        for result, length, score, greedy in of_rows:
            if length:
                result.append(Likelihood(score.sum().item(), length, bool(greedy.all())))
    return results


def _score_tokens(model: Llama, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood (n,) fp64 of each target, and whether no token is likelier (n,), on the CPU.

    Args:
        hidden: (n, hidden), normalised; the logits of a chunk of them exist at a time.
        targets: (n,) int64.
    """
    size, _ = chunk_sizes(hidden.device.type, model.config.vocab_size)
    scores, likeliest = [], []
    for chunk, target in zip(hidden.split(size), targets.split(size), strict=True):
        logits = model.lm_head(chunk).float()
        scores.append(torch.log_softmax(logits, dim=-1).gather(-1, target[:, None])[:, 0])
        likeliest.append(logits.argmax(dim=-1) == target)
    return torch.cat(scores).double().cpu(), torch.cat(likeliest).cpu()
