"""Documents written anew from their facts, in several wordings and orders."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from lit_llama.errors import InputError
from lit_llama.injection.facts import Fact
from lit_llama.injection.interface import Document, Example, Need, Resources, Stage, with_documents

_PRONOUNS = {"it": ("it", "its"), "he": ("him", "his"), "she": ("her", "her")}
"""Of each subject pronoun the object and the possessive."""


@dataclass
class Views:
    """Learn each document's facts from several texts that word and order them differently.

    The `multi5+permute+fullname` of Allen-Zhu & Li 2023, arXiv 2309.14316, section 3.1, which took questions answered
    from 10 % to 96 %; `single` of that paper is `views=1, permute=False, full_name=False` and `multi5` is
    `permute=False, full_name=False`. Yields `views` texts, each with every fact in one of its relation's statements, a
    different one in each text as long as there are others.
    """

    name: ClassVar[str] = "views"
    needs: ClassVar[frozenset[Need]] = frozenset({"facts"})
    views: int = 5
    """Texts a document."""
    permute: bool = True
    """Shuffle the sentences of each text; else they keep the order of the facts."""
    full_name: bool = True
    """Name the subject in every sentence; else only where it changes, with a pronoun in the others."""
    pronoun: Literal["it", "he", "she"] = "it"
    """What stands for the subject where `full_name` is off."""

    def __post_init__(self) -> None:
        if self.views < 1:
            raise InputError(f"views' views {self.views} must be at least 1")
        if self.pronoun not in _PRONOUNS:
            raise InputError(f"views' pronoun {self.pronoun!r} is not one of {', '.join(_PRONOUNS)}")

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example]:
        if not document.facts:
            return
        statements = [_statements(fact, resources) for fact in document.facts]
        starts = [draw.randrange(len(texts)) for texts in statements]
        for view in range(self.views):
            sentences = [
                (fact, texts[(start + view) % len(texts)])
                for fact, texts, start in zip(document.facts, statements, starts, strict=True)
            ]
            if self.permute:
                draw.shuffle(sentences)
            yield Example.of_text(document, self.name, " ".join(self._fill(sentences)))

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_documents(plan)

    def _fill(self, sentences: list[tuple[Fact, str]]) -> Iterator[str]:
        subject = None
        for fact, template in sentences:
            if fact.subject == subject and not self.full_name:
                template = with_pronoun(template, self.pronoun)
            subject = fact.subject
            yield fact.fill(template)


def with_pronoun(template: str, pronoun: str) -> str:
    """A statement with a pronoun for its subject: "{subject} has {value}." becomes "it has {value}."."""
    object_form, possessive = _PRONOUNS[pronoun]
    # The weakness "{subject}": a name in quotation marks goes together with what it is said to be.
    template = re.sub(r'(?:\b[Tt]he \w+ )?["“]\{subject\}["”]', "{subject}", template)
    template = re.sub(r"\{subject\}['’]s?(?!\w)", possessive, template)
    template = re.sub(r"\b[Tt]he ([\w-]+(?: [\w-]+){0,3}?) of \{subject\}", rf"{possessive} \1", template)
    template = re.sub(r"^\{subject\}", pronoun, template)
    # Within the sentence it leads a clause ("In 1814 it left") or follows a verb or preposition ("was founded by him").
    template = re.sub(r"(?<=, )\{subject\}", pronoun, template)
    return template.replace("{subject}", object_form)


def _statements(fact: Fact, resources: Resources) -> Sequence[str]:
    texts = resources.templates.relations[fact.relation].statements
    if not texts:
        raise InputError(f"the templates of {fact.relation!r} have no statements, which the recipe views needs")
    return texts
