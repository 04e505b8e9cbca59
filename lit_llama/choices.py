"""Answers that can only be one of a list: after each token, the ids that some choice goes on with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_llama.errors import InputError
from lit_llama.tokenizer import Tokenizer

_END = -1
"""In a node of the tree, beside the ids that lead on: a choice ends here."""


class ChoiceTree:
    """The choices as a tree of token ids, which many answers can share.

    Args:
        choices: what may be said, each as it would follow the prompt.

    Raises:
        InputError: none, one that is empty, or the same one twice.
    """

    def __init__(self, tokenizer: Tokenizer, choices: Sequence[str]) -> None:
        if not choices or "" in choices or len(set(choices)) < len(choices):
            raise InputError("choices must be one or more different texts, none of them empty")
        self.stop_ids = sorted(tokenizer.stop_ids)
        self.root: dict[int, Any] = {}
        self.longest = 0
        """Tokens of the longest choice."""
        for choice in choices:
            node, ids = self.root, tokenizer.encode(choice, continuation=True)
            self.longest = max(self.longest, len(ids))
            for token_id in ids:
                node = node.setdefault(token_id, {})
            node[_END] = {}


class Choices:
    """Where in a tree of choices an answer has come to."""

    def __init__(self, tree: ChoiceTree) -> None:
        self._stop_ids, self._node = tree.stop_ids, tree.root

    @property
    def finished(self) -> bool:
        """A choice is complete, and no other begins with it."""
        return self._node.keys() == {_END}

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits (1, vocab) with -inf for what no choice goes on with; the end, where one is complete, is a stop id."""
        allowed = [token_id for token_id in self._node if token_id != _END]
        if _END in self._node:
            allowed += self._stop_ids
        restricted = torch.full_like(logits, float("-inf"))
        restricted[:, allowed] = logits[:, allowed]
        return restricted

    def push(self, token_id: int) -> None:
        """Go on with an id that `restrict` allows, and that is not a stop id."""
        self._node = self._node[token_id]
