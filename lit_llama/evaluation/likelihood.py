"""How likely a model holds continuations of a context: what multiple choice and the harness's tasks are scored by."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_llama.generation import PREFILL_TOKENS
from lit_llama.kv_cache import KVCache
from lit_llama.loss import chunk_sizes
from lit_llama.model import Llama


class Likelihood(NamedTuple):
    """Of one continuation behind its context."""

    log_likelihood: float
    """In nats, summed over the tokens."""
    tokens: int
    greedy: bool
    """Whether greedy generation would say exactly this."""
    max_probability: float = math.nan
    """Of the likeliest token at each place, whichever it is, averaged over the places."""
    entropy: float = math.nan
    """Of the next token's distribution, in nats, averaged likewise."""


class TokenScores(NamedTuple):
    """Of each token behind what stands before it, (n,) on the CPU."""

    log_likelihood: Tensor
    """fp64, in nats."""
    greedy: Tensor
    """bool: no token is likelier."""
    max_probability: Tensor
    """fp64, of the likeliest token."""
    entropy: Tensor
    """fp64, of the distribution, in nats."""


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
            cache.wind_back(width)
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        scores = score_tokens(model, hidden[real], targets[real])
        of_rows = zip(results, lengths, *(values.split(lengths) for values in scores), strict=True)
        for result, length, log_likelihood, greedy, max_probability, entropy in of_rows:
            if length:
                certainty = max_probability.mean().item(), entropy.mean().item()
                result.append(Likelihood(log_likelihood.sum().item(), length, bool(greedy.all()), *certainty))
    return results


def score_tokens(model: Llama, hidden: Tensor, targets: Tensor) -> TokenScores:
    """How likely each target is, and how certain the model.

    Args:
        hidden: (n, hidden), normalised; the logits of a chunk of them exist at a time.
        targets: (n,) int64.
    """
    size, _ = chunk_sizes(hidden.device.type, model.config.vocab_size)
    chunks = []
    for chunk, target in zip(hidden.split(size), targets.split(size), strict=True):
        logits = model.lm_head(chunk).float()
        likeliest = logits.argmax(dim=-1)
        logs = torch.log_softmax(logits, dim=-1)
        chosen, largest = logs.gather(-1, torch.stack((target, likeliest), dim=-1)).unbind(dim=-1)
        entropy = torch.special.entr(logs.exp_()).sum(dim=-1)
        chunks.append((chosen, likeliest == target, largest.exp(), entropy))
    chosen, greedy, largest, entropy = (torch.cat(values).cpu() for values in zip(*chunks, strict=True))
    return TokenScores(chosen.double(), greedy, largest.double(), entropy.double())
