"""What the model said before it learned: general questions with the base's own answers, against forgetting to answer.

Replayed text keeps the model's language, and not how it answers: trained on questions of one subject, it gives answers
of that subject to all others. So the base asks itself questions on replayed text and answers them without it, and the
student learns the base's probabilities of these answers, right or wrong (Li & Hoiem 2016, arXiv 1606.09282; the
regulariser of Kujanpää et al. 2024, arXiv 2412.14964).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from lit_llama.errors import InputError
from lit_llama.injection.interface import Document, Example, Need, Rejected, Resources, Stage, with_share
from lit_llama.injection.sentences import paragraphs

REHEARSED = "rehearsed"
"""Group of the examples that the base answered."""


@dataclass
class Rehearse:
    """General questions, answered as the base answers them."""

    name: ClassVar[str] = "rehearse"
    needs: ClassVar[frozenset[Need]] = frozenset({"generator", "replay"})
    questions: int = 4
    """For each injected document."""
    share: float = 0.15
    """Share of the tokens."""
    question_prompt: str = "Ask one short general question on the subject of this text."
    longest_answer: int = 40
    """Tokens; an answer is cut there."""

    def __post_init__(self) -> None:
        if self.questions < 1 or self.longest_answer < 1 or not 0 < self.share < 1:
            raise InputError("rehearse needs questions and longest_answer of 1 or more and a share between 0 and 1")

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example | Rejected]:
        chosen = [draw.choice(resources.replay_texts) for _ in range(self.questions)]
        passages = [Document(document.id, draw.choice(_passages(text)), "") for text in chosen]
        pairs = [(passage, self.question_prompt) for passage in passages]
        written = resources.generator.write_each(pairs, "question", draw.getrandbits(32), 32)
        questions = [text.strip().split("\n")[0] for text in written]
        asked = [question for question in dict.fromkeys(questions) if question.endswith("?")]
        for question in questions:
            if not question.endswith("?"):
                yield Rejected(document.id, self.name, "not a question", question)
        unread = replace(document, text="")
        answers = resources.generator.write_each(
            [(unread, question) for question in asked], "answer", 0, self.longest_answer
        )
        for question, answer in zip(asked, answers, strict=True):
            if answer:
                turns = ((question, 0), (answer, 1))
                yield Example(document.id, self.name, REHEARSED, turns, chat=True, teacher_context="")

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_share(plan, REHEARSED, self.share)


def _passages(text: str) -> list[str]:
    """The paragraphs of a text, or the text."""
    return [" ".join(paragraph) for paragraph in paragraphs(text)] or [text]
