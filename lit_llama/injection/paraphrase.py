"""The document in other words, by a model: facts become answerable when they are met in many wordings."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lit_llama.errors import InputError
from lit_llama.injection.filters import Seen, sifted
from lit_llama.injection.generator import parts_of
from lit_llama.injection.interface import Document, Example, Need, Rejected, Resources, Stage, with_documents


@dataclass
class Paraphrase:
    """Rewrites of each part of the document, beside the document itself.

    Ovadia et al. 2023 (arXiv 2312.05934): accuracy rises with the number of rewrites, up to the ten they made.
    """

    name: ClassVar[str] = "paraphrase"
    needs: ClassVar[frozenset[Need]] = frozenset({"generator"})
    rewrites: int = 5
    """Of each part."""
    part_words: int = 200
    """A document is rewritten in parts of whole sentences of about so many words."""
    instructions: tuple[str, ...] = (
        "Rewrite the text above in your own words. Keep every fact, name and number.",
        "Tell what the text above says in simple words and short sentences. Leave out no name and no number.",
        "Write an article for an encyclopedia with all the facts of the text above, in another order.",
        "Explain to a student everything that the text above says. Name who or what each sentence is about.",
        "Write a report in formal language that holds all the facts, names and numbers of the text above.",
    )
    """Rewrites are asked for by these in turn."""
    shortest: int = 15
    """Words that must be left of a rewrite behind the filters."""

    def __post_init__(self) -> None:
        if self.rewrites < 1 or self.part_words < 1 or not self.instructions:
            raise InputError("paraphrase needs rewrites and part_words of 1 or more, and instructions")

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example | Rejected]:
        yield Example.of_text(document, self.name, document.text)
        seen = Seen(document.text)
        for part in parts_of(document, self.part_words):
            order = draw.sample(self.instructions, len(self.instructions))
            for number, instruction in enumerate(order[: self.rewrites]):
                count = len(range(number, self.rewrites, len(order)))
                longest = 64 + 3 * len(part.text.split())  # tokens; a rewrite may be somewhat longer
                for text in resources.generator.write(
                    part, "paraphrase", instruction, count, draw.getrandbits(32), longest
                ):
                    yield from sifted(document, self.name, text, instruction, self.shortest, seen)

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_documents(plan)
