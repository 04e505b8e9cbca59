"""What a recipe is: documents in, examples to train on and a plan of training out.

    documents -> recipe.expand -> examples, each of a group ("documents", "questions", "replay", ...)
    recipe.stages -> plan: how many tokens of which group, in which order

Recipes compose: `permute+qa+replay` trains on what each of them makes of a document, by the plan that the first begins
and each of the others changes. A recipe is a dataclass whose fields are its options; the table of them is `recipes`'s,
turning examples into tokens is `preparation`'s, and training on them is `finetune/inject.py`'s.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol

from lit_llama.injection.facts import Fact, Templates

Need = Literal["facts", "questions", "headings", "generator", "replay"]
"""What a recipe cannot do without, besides documents."""
DOCUMENTS, QUESTIONS, REPLAY = "documents", "questions", "replay"
"""Groups: text to learn as it stands, questions with answers, and text of other subjects."""
ASKED, UNASKED = "documents, asked", "documents, not asked"
"""Parts of the group `DOCUMENTS`, which a stage may name instead: of documents that there are training questions on,
and of the others."""


@dataclass(frozen=True)
class Document:
    """A text to learn.

    Attributes:
        id: unique; the file's name without suffix where it comes from a folder.
        title: what the document is about, as it would stand in a sentence: "Norway".
        headings: path of headings that the document lies under, from the widest.
        facts: what it says, where that is known as data.
    """

    id: str
    text: str
    title: str
    headings: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True)
class Example:
    """A view of a document, as something to train on.

    Attributes:
        doc_id: of the document; views of one document never meet in a training window.
        recipe: that made it.
        group: what a stage of the plan mixes.
        segments: ((text, weight), ...): weight 1 is learned, 0 is only read. They are joined as they are.
        chat: segments are turns, of user and assistant by turns, and are written in the model's prompt style; else they
            are a text.
        teacher_context: what the teacher reads besides, where the answers are learned from its probabilities.
    """

    doc_id: str
    recipe: str
    group: str
    segments: tuple[tuple[str, int], ...]
    chat: bool = False
    teacher_context: str | None = None

    @classmethod
    def of_text(cls, document: Document, recipe: str, text: str, prefix: str = "") -> "Example":
        """A text in the group `DOCUMENTS`, behind a prefix that is not learned."""
        segments = ((prefix, 0), (text, 1)) if prefix else ((text, 1),)
        return cls(document.id, recipe, DOCUMENTS, segments)

    @classmethod
    def of_question(cls, doc_id: str, recipe: str, question: str, answer: str, group: str = QUESTIONS) -> "Example":
        """A question whose answer is learned."""
        return cls(doc_id, recipe, group, ((question, 0), (answer, 1)), chat=True)


class Rejected(NamedTuple):
    """What a generator wrote that is not trained on, and why; kept with the examples, so that one can look at it."""

    doc_id: str
    recipe: str
    reason: str
    text: str


class Stage(NamedTuple):
    """A part of training: `mix` is each group's share of its tokens, `share` its own share of all tokens."""

    mix: dict[str, float]
    share: float = 1.0


class Generator(Protocol):
    """What writes text on request: a language model, or in tests and synthetic worlds something that knows the facts.

    Attributes:
        identity: changes whenever what is written might, for caches.
    """

    identity: str

    def write(
        self, document: Document, task: str, prompt: str, count: int, seed: int, max_new_tokens: int
    ) -> list[str]:
        """`count` answers to a prompt.

        Args:
            document: that the prompt is about.
            task: name of what is asked for ("paraphrase"), for those that do not read the prompt.
            seed: of the random draws.
        """
        ...

    def write_each(self, pairs: Sequence[tuple[Document, str]], task: str, seed: int, max_new_tokens: int) -> list[str]:
        """One answer to each of many prompts, each on its document; arguments as in `write`."""
        ...


@dataclass
class Resources:
    """What there is besides the document at hand.

    Attributes:
        documents: all that are injected.
        templates: sentences and questions by relation, for facts.
        questions: training questions, rows of a question file with "doc_id".
        generator: writes what templates cannot.
        replay_texts: text of other subjects, where there is any.
        questions_of: the questions by their document's id.
        subjects_of: of each relation and value, in lower case, the subjects that have it.
    """

    documents: Sequence[Document]
    templates: Templates | None = None
    questions: Sequence[dict] = ()
    generator: Generator | None = None
    replay_texts: Sequence[str] = ()
    questions_of: dict[str, list[dict]] = field(init=False)
    subjects_of: dict[tuple[str, str], set[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.questions_of, self.subjects_of = {}, {}
        for question in self.questions:
            self.questions_of.setdefault(question["doc_id"], []).append(question)
        for fact in (fact for document in self.documents for fact in document.facts):
            for answer in fact.answers:
                self.subjects_of.setdefault((fact.relation, answer.casefold()), set()).add(fact.subject)


class Recipe(Protocol):
    """One way to inject knowledge.

    Attributes:
        name: as in `--recipe`.
        needs: what must be there for it; `preparation` checks that.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example | Rejected]:
        """The document as examples: a function of its arguments and the recipe's options only.

        Args:
            draw: random numbers that belong to this recipe, document and seed.
        """
        ...

    def stages(self, plan: list[Stage]) -> list[Stage]:
        """The plan of the recipes before this one, changed as it needs; [] for the first."""
        ...


def with_documents(plan: list[Stage]) -> list[Stage]:
    """The plan itself, or where there is none yet, one stage of documents."""
    return plan or [Stage({DOCUMENTS: 1.0})]


def with_share(plan: list[Stage], group: str, share: float) -> list[Stage]:
    """The plan with a group added to each stage, so that it has that share of the tokens in all."""
    return [
        stage._replace(mix={**{name: part * (1 - share) for name, part in stage.mix.items()}, group: share})
        if group not in stage.mix
        else stage
        for stage in with_documents(plan)
    ]


def example_rows(examples: Sequence[Example | Rejected]) -> list[dict]:
    """As JSON objects, for people to read and for caches."""
    rows = []
    for example in examples:
        row = example._asdict() if isinstance(example, Rejected) else dict(vars(example))
        rows.append(row)
    return rows


def example_of_row(row: dict) -> Example | Rejected:
    """The inverse of `example_rows`, for one of them."""
    if "reason" in row:
        return Rejected(**row)
    return Example(**{**row, "segments": tuple((text, weight) for text, weight in row["segments"])})
