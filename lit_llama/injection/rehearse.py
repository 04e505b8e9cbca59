"""What the model said before it learned: general questions with the base's own answers, against forgetting to answer.

Replayed text keeps the model's language, and not how it answers: trained on questions of one subject, it gives answers
of that subject to all others. So the base is asked about names in replayed text, and the student learns the base's
probabilities of its answers, right or wrong (Li & Hoiem 2016, arXiv 1606.09282; the regulariser of Kujanpää et al.
2024, arXiv 2412.14964).
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from lit_llama.errors import InputError
from lit_llama.injection.interface import Document, Example, Need, Resources, Stage, with_share

REHEARSED = "rehearsed"
"""Group of the examples that the base answered."""
QUESTIONS = (
    "What is {name}?",
    "Who or what is {name}?",
    "What is {name} known for?",
    "What do you know about {name}?",
    "Where does one meet with {name}?",
    "When was {name} first heard of?",
    "Why does {name} matter?",
    "Name one thing that has to do with {name}.",
    "How would you explain {name} to a child?",
    "Which century does {name} belong to?",
    "Who made {name} known?",
    "What is {name} made of?",
)
"""Of many kinds; whether they fit the name does not matter, as the answers are only to stay what they were."""
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][\w'’-]+(?: [A-Z][\w'’-]+)*")
"""Words with capitals that do not begin a sentence."""


@dataclass
class Rehearse:
    """General questions, answered as the base answers them."""

    name: ClassVar[str] = "rehearse"
    needs: ClassVar[frozenset[Need]] = frozenset({"generator", "replay"})
    questions: int = 4
    """For each injected document."""
    share: float = 0.15
    """Share of the tokens."""
    longest_answer: int = 40
    """Tokens; an answer is cut there."""

    def __post_init__(self) -> None:
        if self.questions < 1 or self.longest_answer < 1 or not 0 < self.share < 1:
            raise InputError("rehearse needs questions and longest_answer of 1 or more and a share between 0 and 1")

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example]:
        texts = draw.sample(resources.replay_texts, min(self.questions, len(resources.replay_texts)))
        names = sorted({name for text in texts for name in _NAME.findall(text)})
        asked = draw.sample(names, min(self.questions, len(names)))
        unread = replace(document, text="")
        pairs = [(unread, draw.choice(QUESTIONS).format(name=name)) for name in asked]
        answers = resources.generator.write_each(pairs, "answer", 0, self.longest_answer)
        for (_, question), answer in zip(pairs, answers, strict=True):
            if answer:
                turns = ((question, 0), (answer, 1))
                yield Example(document.id, self.name, REHEARSED, turns, chat=True, teacher_context="")

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_share(plan, REHEARSED, self.share)
