"""What follows from the document, by a model, each statement an example of its own (SEAL, Zweiger et al. 2025, arXiv
2506.10943)."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lit_llama.errors import InputError
from lit_llama.injection.filters import Seen, sifted
from lit_llama.injection.generator import list_lines, parts_of
from lit_llama.injection.interface import Document, Example, Need, Rejected, Resources, Stage, with_documents


@dataclass
class Implications:
    """Statements that the document states or implies, beside the document itself.

    With `closure`, the model that wrote a statement is asked whether the document supports it, and what it does not
    confirm is dropped: a filter in the manner of Deductive Closure Training (Akyürek et al. 2024, arXiv 2401.08574).
    """

    name: ClassVar[str] = "implications"
    needs: ClassVar[frozenset[Need]] = frozenset({"generator"})
    lists: int = 5
    """Lists of statements that are written for each part of the document; SEAL's number."""
    part_words: int = 300
    """A document is read in parts of whole sentences of about so many words."""
    prompts: tuple[str, ...] = (
        "List what follows from the text above, directly or indirectly. Write one statement a line, each a whole"
        " sentence that can be understood without the text and names who or what it is about.",
        "Which facts does the text above state, and what can be concluded from them? Write a long list, one sentence a"
        " line, and use names instead of pronouns.",
    )
    """Lists are asked for by these in turn."""
    closure: bool = False
    """Keep only statements that the generator confirms; costs a short answer for each."""
    closure_prompt: str = 'Does the text above say or imply this: "{statement}" Answer yes or no.'
    """Asks for that, "{statement}"."""
    shortest: int = 4
    """Words of a statement."""
    max_new_tokens: int = 512
    """Of a list."""

    def __post_init__(self) -> None:
        if self.lists < 1 or self.part_words < 1 or not self.prompts or "{statement}" not in self.closure_prompt:
            raise InputError(
                'implications needs lists and part_words of 1 or more, prompts, and "{statement}" in closure_prompt'
            )

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example | Rejected]:
        yield Example.of_text(document, self.name, document.text)
        seen, write = Seen(document.text), resources.generator.write
        for part in parts_of(document, self.part_words):
            for number, prompt in enumerate(self.prompts[: self.lists]):
                count = len(range(number, self.lists, len(self.prompts)))
                for text in write(part, "implications", prompt, count, draw.getrandbits(32), self.max_new_tokens):
                    for statement in list_lines(text):
                        for example in sifted(document, self.name, statement, prompt, self.shortest, seen):
                            yield self._closed(example, part, resources) if self.closure else example

    def _closed(self, example: Example | Rejected, part: Document, resources: Resources) -> Example | Rejected:
        if isinstance(example, Rejected):
            return example
        statement, _ = example.segments[-1]
        prompt = self.closure_prompt.replace("{statement}", statement)
        (verdict,) = resources.generator.write(part, "closure", prompt, 1, 0, 8)
        if verdict.strip().lower().startswith("yes"):
            return example
        return Rejected(example.doc_id, self.name, "not confirmed by the generator", statement)

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_documents(plan)
