"""Text of other subjects among the documents, against forgetting."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lit_llama.errors import InputError
from lit_llama.injection.interface import REPLAY, Document, Example, Need, Resources, Stage, with_share


@dataclass
class Replay:
    """Give general text a share of every stage (Ibrahim et al. 2024, arXiv 2403.08763: 1 % helps much, 5-25 % more)."""

    name: ClassVar[str] = "replay"
    needs: ClassVar[frozenset[Need]] = frozenset({"replay"})
    ratio: float = 0.1
    """Share of the tokens."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise InputError(f"replay's ratio {self.ratio} must be between 0 and 1; leave the recipe out for none")

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example]:
        return iter(())

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_share(plan, REPLAY, self.ratio)
