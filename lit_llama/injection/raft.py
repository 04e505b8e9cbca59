"""Questions with documents to read: keeps up answering from a text, which training on closed-book answers unlearns."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lit_llama.errors import InputError
from lit_llama.evaluation.retrieval import Passage, open_book_prompt
from lit_llama.injection.interface import Document, Example, Need, Rejected, Resources, Stage, with_share
from lit_llama.injection.sentences import capitalised, mentions, paragraphs

OPEN_BOOK = "open book"
"""The group of these examples."""


@dataclass
class Raft:
    """Training questions asked with the document among distractors (Zhang et al. 2024, arXiv 2403.10131).

    Yields, for each training question on the document, a conversation: passages of the document and of others in any
    order and the question, then the sentence of the document that holds the answer, word for word, and the answer. In
    the other rows the document is missing and the answer stands alone; the paper quotes there too, from a text that
    nobody can see. Questions whose answer is in no sentence come as `Rejected`.
    """

    name: ClassVar[str] = "raft"
    needs: ClassVar[frozenset[Need]] = frozenset({"questions"})
    share: float = 0.1
    """Share of the tokens."""
    distractors: int = 4
    """Passages of other documents, fewer where there are no more."""
    with_document: float = 0.8
    """Share of rows that show the document."""
    max_words: int = 16
    """Length of a passage: whole sentences of a document, around the answer or any other. All of a row must fit into a
    training window: five passages of 16 words do into 256 tokens, of 40 words into 512."""
    quote: bool = True
    """Quote before answering; off, questions and answers have the form of the open-book evaluation."""

    def __post_init__(self) -> None:
        if not (0 < self.share < 1 and 0 <= self.with_document <= 1):
            raise InputError(
                f"raft's share {self.share} must be between 0 and 1, and so must with_document {self.with_document}"
            )
        if self.distractors < 0 or self.max_words < 1:
            raise InputError(
                f"raft's distractors {self.distractors} must be at least 0, its max_words {self.max_words} at least 1"
            )

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example | Rejected]:
        questions = resources.questions_of.get(document.id)
        sentences = _sentences(document)
        for question in questions or ():
            place = answer_place(sentences, question["question"], question["answers"])
            if place is None:
                yield Rejected(document.id, self.name, "the answer is in no sentence", question["question"])
                continue
            picked = draw.sample(resources.documents, min(self.distractors + 1, len(resources.documents)))
            others = [other for other in picked if other.id != document.id][: self.distractors]
            passages = [self._any_passage(other, draw) for other in others]
            shown = not passages or draw.random() < self.with_document
            if shown:
                passage = self._passage(document, sentences, place, draw)
                passages.insert(draw.randint(0, len(passages)), passage)
            quoted = sentences[place] if shown else None
            yield Example.of_question(document.id, self.name, *self._row(question, passages, quoted), group=OPEN_BOOK)

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_share(plan, OPEN_BOOK, self.share)

    def _any_passage(self, document: Document, draw: random.Random) -> Passage:
        sentences = _sentences(document)
        lengths = [len(sentence.split()) for sentence in sentences]
        # Where all are too long, the shortest.
        fitting = [place for place, words in enumerate(lengths) if words <= max(self.max_words, min(lengths))]
        return self._passage(document, sentences, draw.choice(fitting), draw)

    def _passage(self, document: Document, sentences: list[str], place: int, draw: random.Random) -> Passage:
        first, last = around(sentences, place, self.max_words, draw)
        text = " ".join(sentences[first:last])
        # A passage that begins "Its area is" would not say whose.
        named = mentions(sentences[first], document.title)
        return Passage(document.id, text if named else f"{capitalised(document.title)}: {text}")

    def _row(self, question: dict[str, Any], passages: list[Passage], quoted: str | None) -> tuple[str, str]:
        answer = question["answers"][0]
        if not self.quote:
            return open_book_prompt(question["question"], passages), answer
        texts = "\n\n".join(passage.text for passage in passages)
        prompt = f"{texts}\n\n{question['question']}\nQuote the sentence that says so, if there is one, then answer."
        return prompt, f"“{quoted}”\n{answer}" if quoted else answer


def _sentences(document: Document) -> list[str]:
    # A document of nothing but headings is one sentence.
    return [text for paragraph in paragraphs(document.text) for text in paragraph] or [document.text]


def answer_place(sentences: Sequence[str], question: str, answers: Sequence[str]) -> int | None:
    """Of the sentences that hold an answer, the first of those that share most words with the question."""
    asked = _words(question)
    places = [place for place, text in enumerate(sentences) if any(mentions(text, answer) for answer in answers)]
    return max(places, key=lambda place: len(asked & _words(sentences[place])), default=None)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def around(sentences: Sequence[str], place: int, max_words: int, draw: random.Random) -> tuple[int, int]:
    """First and last (exclusive) of the sentence at `place` and of random numbers of those before and behind it.

    They have `max_words` words at most, unless that one sentence has more.
    """
    first = last = place
    left = max_words - len(sentences[place].split())
    sides = {-1, 1}
    while sides:
        side = draw.choice(sorted(sides))
        there = first - 1 if side < 0 else last + 1
        words = len(sentences[there].split()) if 0 <= there < len(sentences) else max_words + 1
        if words > left:
            sides.remove(side)
            continue
        left -= words
        first, last = min(first, there), max(last, there)
    return first, last + 1
