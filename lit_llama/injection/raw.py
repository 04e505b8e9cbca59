"""The documents as they are: continued pretraining, which every other recipe is measured against."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lit_llama.injection.interface import Document, Example, Need, Resources, Stage, with_documents


@dataclass
class Raw:
    """Learn each document's text (Gururangan et al. 2020, arXiv 2004.10964): low loss on it, but seldom answers."""

    name: ClassVar[str] = "raw"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example]:
        yield Example.of_text(document, self.name, document.text)

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_documents(plan)
