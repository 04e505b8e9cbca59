"""The model says how it would study the document, then does so: Active Reading (Lin et al. 2025, arXiv 2508.09494)."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lit_llama.errors import InputError
from lit_llama.injection.filters import Seen, copies_prompt, length, sifted
from lit_llama.injection.generator import list_lines, parts_of
from lit_llama.injection.interface import Document, Example, Need, Rejected, Resources, Stage, with_documents


@dataclass
class Study:
    """Notes that each strategy of the model's own yields, beside the document itself.

    It takes a model that can plan; one of a few hundred million parameters lists no strategies.
    """

    name: ClassVar[str] = "study"
    needs: ClassVar[frozenset[Need]] = frozenset({"generator"})
    strategies: int = 5
    """At most applied to each part of the document."""
    part_words: int = 400
    """A document is studied in parts of whole sentences of about so many words."""
    list_prompt: str = (
        "List different strategies for studying the text above, so that one remembers every fact in it and can answer"
        " questions on it without the text. Write one strategy a line, each as an instruction that says what to write"
        " down."
    )
    """Asks for strategies, one a line."""
    apply_prompt: str = (
        "Study the text above in this way: {strategy}\nWrite the result in whole sentences that can be understood"
        " without the text. Name who or what each sentence is about."
    )
    """Asks to apply one, "{strategy}"."""
    shortest: int = 8
    """Words that must be left of a note behind the filters."""
    max_new_tokens: int = 512
    """Of a list or a note."""

    def __post_init__(self) -> None:
        if self.strategies < 1 or self.part_words < 1 or "{strategy}" not in self.apply_prompt:
            raise InputError('study needs strategies and part_words of 1 or more, and "{strategy}" in apply_prompt')

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example | Rejected]:
        yield Example.of_text(document, self.name, document.text)
        seen, write = Seen(document.text), resources.generator.write
        for part in parts_of(document, self.part_words):
            (listed,) = write(part, "strategies", self.list_prompt, 1, draw.getrandbits(32), self.max_new_tokens)
            strategies = []
            for strategy in list_lines(listed):
                reason = (
                    length(strategy, 3, 40)
                    or copies_prompt(strategy, self.list_prompt)
                    or ("speaks of itself" if strategy.endswith(":") else None)
                    or ("repeats itself" if strategy in strategies else None)
                )
                if reason is None:
                    strategies.append(strategy)
                else:
                    yield Rejected(document.id, self.name, f"strategy {reason}", strategy)
            for strategy in strategies[: self.strategies]:
                prompt = self.apply_prompt.replace("{strategy}", strategy)
                for text in write(part, "study", prompt, 1, draw.getrandbits(32), self.max_new_tokens):
                    yield from sifted(document, self.name, text, prompt, self.shortest, seen)

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_documents(plan)
