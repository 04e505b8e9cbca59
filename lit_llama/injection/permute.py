"""Sentences of a document in other orders, each naming what it is about."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lit_llama.errors import InputError
from lit_llama.injection.interface import Document, Example, Need, Resources, Stage, with_documents
from lit_llama.injection.sentences import capitalised, is_closed, label, leans, mentions, paragraphs, with_names


@dataclass
class Permute:
    """Learn each document in several orders of its sentences (Allen-Zhu & Li 2023, arXiv 2309.14316, section 3.1).

    A fact that always follows the same words is stored under these words, not under the name that questions ask by.
    Yields up to `views` texts: the document as it is, then all its sentences shuffled, headings left out. A sentence
    that leans on the one before it ("However, ...") moves with it. A document with few sentences has fewer orders.
    """

    name: ClassVar[str] = "permute"
    needs: ClassVar[frozenset[Need]] = frozenset()
    views: int = 5
    """Texts a document, the original with them."""
    names: bool = True
    """Put the title into the shuffled sentences that do not hold it: for a pronoun ("Its area is" becomes "Norway's
    area is"), for a label ("Climate: mild." becomes "Climate of Norway: mild."), or in front ("Norway: ...")."""
    tag: str | None = None
    """A source to put in front of every text, which is read but not learned: it tells what is worth keeping where much
    of the training text is not (Allen-Zhu & Li 2024, arXiv 2404.05405)."""

    def __post_init__(self) -> None:
        if self.views < 1:
            raise InputError(f"permute's views {self.views} must be at least 1")

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example]:
        prefix = f"{self.tag}\n\n" if self.tag else ""
        units = standing_alone(document, self.names)
        seen = set()
        for view in range(self.views):
            text = document.text if view == 0 else joined(draw.sample(units, len(units)))
            if text and text not in seen:
                seen.add(text)
                yield Example.of_text(document, self.name, text, prefix)

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_documents(plan)


def standing_alone(document: Document, names: bool) -> list[str]:
    """The document's sentences as units that make sense in any order, each naming the title where `names` asks so."""
    units: list[str] = []
    for sentences in paragraphs(document.text):
        first = len(units)
        for sentence in with_names(sentences, document.title) if names else sentences:
            if len(units) > first and leans(sentence):
                units[-1] += f" {sentence}"
            else:
                units.append(sentence)
    return [_named(unit, document.title) for unit in units] if names else units


def _named(unit: str, title: str) -> str:
    if mentions(unit, title):
        return unit
    head = label(unit)
    return f"{head} of {title}{unit[len(head) :]}" if head else f"{capitalised(title)}: {unit}"


def joined(units: list[str]) -> str:
    """The units as one text: sentences in a row, what does not end as one on a line of its own."""
    text = units[0] if units else ""
    for before, unit in zip(units, units[1:], strict=False):
        text += (" " if is_closed(before) and is_closed(unit) else "\n") + unit
    return text
