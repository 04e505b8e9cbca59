"""Questions with their answers: mixed in, before the documents, or alone.

They teach how knowledge is asked for. Trained with or before the documents, on a part of them, they make the facts of
the others answerable too; after them, much less (Jiang et al. 2024, arXiv 2402.12847; Allen-Zhu & Li, arXiv
2309.14316).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lit_llama.errors import InputError
from lit_llama.injection.interface import (
    ASKED,
    QUESTIONS,
    UNASKED,
    Document,
    Example,
    Need,
    Resources,
    Stage,
    with_share,
)


def _questions_on(document: Document, resources: Resources, recipe: str) -> Iterator[Example]:
    for row in resources.questions_of.get(document.id, []):
        yield Example.of_question(document.id, recipe, row["question"], row["answers"][0])


@dataclass
class Qa:
    """Mix training questions into every stage."""

    name: ClassVar[str] = "qa"
    needs: ClassVar[frozenset[Need]] = frozenset({"questions"})
    share: float = 0.4
    """Share of the tokens."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(f"qa's share {self.share} must be between 0 and 1; qa-only trains on questions alone")

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example]:
        return _questions_on(document, resources, self.name)

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_share(plan, QUESTIONS, self.share)


@dataclass
class PreInstruction:
    """Questions first, then questions with the documents that they are on, then the other documents (PIT++)."""

    name: ClassVar[str] = "pit"
    needs: ClassVar[frozenset[Need]] = frozenset({"questions"})
    questions_first: float = 0.15
    """Share of all tokens that are questions alone, at the start."""
    together: float = 0.5
    """Share of all tokens of the stage of questions and documents, half and half."""

    def __post_init__(self) -> None:
        if not (self.questions_first > 0 and self.together > 0 and self.questions_first + self.together < 1):
            raise InputError(
                f"pit's shares questions_first {self.questions_first} and together {self.together} must be above 0 and"
                " below 1 in sum"
            )

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example]:
        return _questions_on(document, resources, self.name)

    def stages(self, plan: list[Stage]) -> list[Stage]:
        last = 1 - self.questions_first - self.together
        return [
            Stage({QUESTIONS: 1.0}, self.questions_first),
            Stage({QUESTIONS: 0.5, ASKED: 0.5}, self.together),
            Stage({UNASKED: 1.0}, last),
        ]


@dataclass
class QuestionsOnly:
    """Training questions and no document: what the form of questions gives without the knowledge. A control."""

    name: ClassVar[str] = "qa-only"
    needs: ClassVar[frozenset[Need]] = frozenset({"questions"})

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example]:
        return _questions_on(document, resources, self.name)

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return [Stage({QUESTIONS: 1.0})]
