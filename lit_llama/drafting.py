"""Guesses of the next tokens, cheap enough that checking them all at once beats computing them one by one.

Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) with guesses that are certain: the model computes what
follows each of them in one pass, draws its own token everywhere, and goes on up to the first that was guessed wrong.
What is said is therefore to the token what it would be without guesses, for a seed also when sampling; only time
changes. Who checks the guesses is `batching.py`.
"""

from collections.abc import Callable, Sequence

import torch

from lit_llama.errors import InputError
from lit_llama.generation import next_logits, read_prompt
from lit_llama.kv_cache import KVCache
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer

Drafter = Callable[[list[int], int], list[int]]
"""(tokens of a sequence so far, most guesses) -> guesses of those that follow. Of one sequence: it may remember it."""

LONGEST_MATCH = 3
"""Tokens at the end of a sequence that are looked up in it; shorter ones, down to 2, where so many are not found."""
READ_TOKENS = 512
"""Most tokens that a draft model reads at a time: others wait for it, and its memory is not that of a whole prompt."""


def look_up(tokens: list[int], count: int) -> list[int]:
    """What followed the last tokens where they occurred before: text that repeats itself or its prompt.

    Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding); the latest occurrence counts.
    """
    for length in range(LONGEST_MATCH, 1, -1):
        wanted, last = tokens[-length:], tokens[-1]
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - 1] == last and tokens[end - length : end] == wanted:
                return tokens[end : end + count]
    return []


class DraftModel:
    """The greedy continuation of one sequence by a smaller model with the same vocabulary.

    Of a long prompt it reads a piece whenever it is asked, and guesses when it has caught up.
    """

    def __init__(self, model: Llama) -> None:
        weight, context = model.model.norm.weight, model.config.max_position_embeddings
        self.model = model
        self.cache = KVCache(model.config, 1, context, weight.dtype, weight.device)
        self.read: list[int] = []
        """Tokens whose keys and values the cache holds."""

    @torch.inference_mode()
    def __call__(self, tokens: list[int], count: int) -> list[int]:
        if len(tokens) + count > self.cache.max_length:
            return []
        known = self.cache.kept(min(shared_length(self.read, tokens), len(tokens) - 1), self.cache.reached)
        self.cache.wind_back(known)  # what was guessed wrong is overwritten
        guesses: list[int] = []
        new = tokens[known:]
        if len(new) > READ_TOKENS:
            piece = torch.tensor([new[:READ_TOKENS]], device=self.cache.device)
            read_prompt(self.model, piece, self.cache)
            self.read = tokens[: known + READ_TOKENS]
            return []
        for _ in range(count):
            guesses.append(int(next_logits(self.model, new, self.cache).argmax()))
            new = guesses[-1:]
        self.read = tokens + guesses[:-1]
        return guesses


def check_vocabulary(tokenizer: Tokenizer, draft: Tokenizer) -> None:
    """Refuse a draft model that means other text by the same ids.

    Raises:
        InputError: it does.
    """
    if draft.vocab_size != tokenizer.vocab_size or any(
        draft.bytes_of(token_id) != tokenizer.bytes_of(token_id) for token_id in range(tokenizer.vocab_size)
    ):
        raise InputError(
            f"{draft.path}: not the vocabulary of {tokenizer.path}; a draft model must share it, as a smaller one of"
            " the same family does"
        )


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    shortest = min(len(first), len(second))
    if first[:shortest] == second[:shortest]:  # at the speed of a comparison of memory, and often so
        return shortest
    return next(at for at in range(shortest) if first[at] != second[at])
