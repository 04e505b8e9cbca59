"""The other direction: from the value to the subject."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lit_llama.errors import InputError
from lit_llama.injection.facts import Fact
from lit_llama.injection.interface import Document, Example, Need, Resources, Stage, with_documents
from lit_llama.injection.sentences import paragraphs, without_article


@dataclass
class Reverse:
    """Learn facts backwards too: who learns "A is B" does not know what B is (Berglund et al. 2023, arXiv 2309.12288).

    Of a document with facts yields texts of its reversed statements, in all wordings that the templates have and in
    any order, and, if there are training questions on the document, its reversed questions, for the plan of a recipe
    that trains on questions. A value that two subjects share is not asked about. Of a document without facts yields one
    text, the document from its last words to its first, with names, numbers and quotations left as they are (Golovneva
    et al. 2024, arXiv 2403.13799).
    """

    name: ClassVar[str] = "reverse"
    needs: ClassVar[frozenset[Need]] = frozenset()
    segment_words: int = 1
    """Without facts: up to how many words, at random, keep their order."""

    def __post_init__(self) -> None:
        if self.segment_words < 1:
            raise InputError(f"reverse's segment_words {self.segment_words} must be at least 1")

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example]:
        if not document.facts:
            sentences = [sentence for paragraph in paragraphs(document.text) for sentence in paragraph]
            text = " ".join(reversed_words(text, document.title, self.segment_words, draw) for text in sentences[::-1])
            if text:
                yield Example.of_text(document, self.name, text)
            return
        relations = resources.templates.relations
        if not any(texts.reversed_statements or texts.reversed_questions for texts in relations.values()):
            raise InputError(
                "the recipe reverse needs reversed_statements or reversed_questions in the templates of documents with"
                " facts"
            )
        templates = {fact: relations[fact.relation] for fact in document.facts}
        for view in range(max(len(texts.reversed_statements) for texts in templates.values())):
            sentences = [
                fact.fill(texts.reversed_statements[view % len(texts.reversed_statements)])
                for fact, texts in templates.items()
                if texts.reversed_statements
            ]
            draw.shuffle(sentences)
            yield Example.of_text(document, self.name, " ".join(sentences))
        if document.id in resources.questions_of:
            for fact, texts in templates.items():
                if texts.reversed_questions and is_unique(fact, resources):
                    for question in texts.reversed_questions:
                        yield Example.of_question(document.id, self.name, fact.fill(question), fact.subject)

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_documents(plan)


def is_unique(fact: Fact, resources: Resources) -> bool:
    """Whether the value, in any of its forms, tells the subject: no other subject of the documents has it."""
    subjects = [resources.subjects_of.get((fact.relation, answer.casefold()), set()) for answer in fact.answers]
    return set.union(*subjects) <= {fact.subject}


_NAME = r"(?:[A-Z][\w'’.-]*\w|[A-Z])"
_NAMES = (
    rf"(?!(?:The|A|An|In|On|At|By|Of|For|From|It|Its|He|His|She|Her|They|Their|This|These|After|Before|During)\b)"
    rf"{_NAME}(?: (?:(?:of|the|de|da|del|la|von|van) )*{_NAME})*"
)
_NUMBER = r"[-.]?\d[\d.,:/]*\d(?:st|nd|rd|th)?|[-.]?\d(?:st|nd|rd|th)?"
_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_UNIT = r"(?: ?(?:sq km|km|m|cm|mm|kg|ft|miles|million|billion|percent)\b| ?%)*"


def reversed_words(sentence: str, title: str, segment_words: int, draw: random.Random) -> str:
    """The sentence from its end to its start, its final punctuation kept; names, numbers and quotations stay whole."""
    entity = "|".join(
        [
            rf"(?:[Tt]he )?{re.escape(without_article(title))}(?! [A-Z])",
            r"\"[^\"]*\"|“[^”]*”|\([^()]*\)",
            rf"\d{{1,2}} {_MONTH}(?: \d{{4}})?|{_MONTH} \d{{1,2}}(?:, \d{{4}})?",
            rf"(?:{_NUMBER}){_UNIT}",
            _NAMES,
        ]
    )
    body = sentence.rstrip(".!?…")
    # A word ends before the punctuation behind it, which is a piece of its own.
    pieces = re.findall(rf"(?:{entity})(?:['’]s?)?(?=[,;:]?(?:\s|$))|[,;:](?=\s|$)|\S+?(?=[,;:]?(?:\s|$))", body)
    segments: list[str] = []
    left = 0
    for piece in pieces:
        if left and piece not in ",;:":
            segments[-1] += f" {piece}"
            left -= 1
        else:
            segments.append(piece)
            left = draw.randint(1, segment_words) - 1 if piece not in ",;:" else 0
    return re.sub(r" ([,;:])", r"\1", " ".join(reversed(segments))) + sentence[len(body) :]
