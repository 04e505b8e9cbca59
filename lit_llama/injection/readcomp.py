"""Reading tasks mined from a document by patterns, behind its text."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lit_llama.errors import InputError
from lit_llama.injection.interface import Document, Example, Need, Resources, Stage, with_documents
from lit_llama.injection.sentences import capitalised, is_closed, leans, paragraphs, with_names


@dataclass
class ReadingComprehension:
    """Learn each document with exercises on it (AdaptLLM, Cheng et al. 2023, arXiv 2309.09530).

    Yields `views` texts: the document and up to `tasks_a_kind` tasks of each kind that its sentences give occasion to:
    title, topic, sentence from words, definition, what follows, why, same or opposite meaning, completion. Connectives
    ("Therefore", "However", "due to") tell the answers. Tasks stand in varied words, and some the other way round, from
    the answer to the question. The text is about twice as long as the document, and training windows that hold all of
    it (`--train.sequence_length`) keep the tasks together with what they are on.
    """

    name: ClassVar[str] = "readcomp"
    needs: ClassVar[frozenset[Need]] = frozenset()
    tasks_a_kind: int = 2
    """Most tasks of one kind."""
    views: int = 1
    """Texts a document, with other tasks or other wordings."""

    def __post_init__(self) -> None:
        if self.tasks_a_kind < 1 or self.views < 1:
            raise InputError(f"readcomp's tasks_a_kind {self.tasks_a_kind} and views {self.views} must be at least 1")

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example]:
        for _ in range(self.views):
            tasks = []
            for kind, found in mined_tasks(document, draw).items():
                for slots in draw.sample(found, min(self.tasks_a_kind, len(found))):
                    question, answer = draw.choice(TASKS[kind])
                    tasks.append((question.format(**slots), answer.format(**slots)))
            draw.shuffle(tasks)
            layout = draw.choice(("{}\n{}", "Question: {}\nAnswer: {}", "Q: {}\nA: {}", "Task: {}\nSolution: {}"))
            text = "\n\n".join([document.text, draw.choice(_LEADS), *(layout.format(*task) for task in tasks)])
            # The title's task may also be the other way round: to write the text.
            if draw.random() < 0.25:
                text = f"{draw.choice(_WRITE).format(title=document.title)}\n\n{text}"
            yield Example.of_text(document, self.name, text)

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_documents(plan)


_LEADS = (
    "Some exercises on this text:",
    "Now answer questions about what you have read.",
    "What has been understood? Tasks on the text above:",
    "Reading check",
    "Use the text to work on these tasks.",
)
_WRITE = (
    'Write a text with the title "{title}".',
    "Tell me what you know about {title}.",
    "Explain {title} at length.",
)

TASKS: dict[str, tuple[tuple[str, str], ...]] = {
    "title": (
        ("Which title suits the text?", "{title}"),
        ("Sum the text up in one title.", "{title}"),
        ("Who or what does the text deal with?", "{title}"),
    ),
    "topic": (
        ("What is the topic of {first}?", "{second}"),
        ("Name the subject of {first}.", "{second}"),
        ("What deals with {second}?", "{first}"),
    ),
    "words": (
        ("Build a sentence on {title} from these words: {words}.", "{sentence}"),
        ("Which statement about {title} uses the words {words}?", "{sentence}"),
        ("Pick the key words from this sentence on {title}: {sentence}", "{words}"),
    ),
    "definition": (
        ("How is {first} defined?", "{second}"),
        ("Give the meaning of {first}.", "{second}"),
        ("Which word has this definition: {second}", "{first}"),
    ),
    "entails": (
        ("First: {first}\nSecond: {second}\nDoes the second follow from the first? Yes, maybe or no?", "Yes"),
        ("{first} Is it then true that the following holds? {second}", "Yes"),
        ("{first} What follows from that?", "{second}"),
        ("Find a reason for this: {second}", "{first}"),
    ),
    "neutral": (
        ("First: {first}\nSecond: {second}\nDoes the second follow from the first? Yes, maybe or no?", "Maybe"),
        ("{first} Is it then true that the following holds? {second}", "It may be"),
        ("{first} What can be added to this?", "{second}"),
        ("What goes before this addition? {second}", "{first}"),
    ),
    "contradicts": (
        ("First: {first}\nSecond: {second}\nDoes the second follow from the first? Yes, maybe or no?", "No"),
        ("{first} Is it then true that the following does not hold? {second}", "No"),
        ("{first} What happened in spite of this?", "{second}"),
    ),
    "effect": (
        ("What is the effect of this? {first}", "{second}"),
        ("What did this lead to? {first}", "{second}"),
        ("What brought this about? {second}", "{first}"),
    ),
    "cause": (
        ("What is the cause of this? {effect}", "{cause}"),
        ("Why is it so? {effect}", "Because of {cause}"),
        ("What results from {cause}?", "{effect}"),
    ),
    "similar": (
        ("Do these two statements mean much the same? {first} {second}", "Yes"),
        ("Say this in another way: {first}", "{second}"),
        ("Find a sentence that supports this one: {second}", "{first}"),
    ),
    "different": (
        ("Do these two statements mean much the same? {first} {second}", "No"),
        ("What stands against this? {first}", "{second}"),
        ("To what is this the other side? {second}", "{first}"),
    ),
    "completion": (
        ("How does this sentence about {title} go on? {first} ...", "{second}"),
        ("Complete what the text says about {title}: {first} ...", "... {second}"),
    ),
}
"""Of each kind of task its pairs of question and answer, to be filled with what `mined_tasks` finds."""

_CONNECTIVES = {
    # The same pair of statements serves the kinds that its connective is a sign of.
    ("entails", "effect"): r"(?:Therefore|Thus|Accordingly|Hence|Consequently|For this reason|As a result),"
    r"|(?:Therefore|Thus|Hence)(?= (?:the|it|he|she|they|this|these)\b)",
    ("entails",): r"Yes,",
    ("neutral",): r"(?:Maybe|Furthermore|Additionally|Moreover|In addition),",
    ("contradicts", "different"): r"(?:No|However|On the contrary|In contrast|Nevertheless),|(?:But|Whereas)\b",
    ("similar",): r"(?:Similarly|Equally|In other words|Namely|That is to say),",
}
_CLAUSES = re.compile(r"; |, (?=whereas )")
_FEW_WORDS = r"(?P<first>(?:\S+ ){0,7}\S+)"
_MINED_FROM_ONE = {
    "topic": [
        # "The island is about 20 km long" has no topic.
        rf"{_FEW_WORDS}(?: talks about| is about(?! (?:\d+|half|an?|one|two|three|the same)\b)|'s topic is)"
        r" (?P<second>.+)"
    ],
    "definition": [
        rf"(?:The (?:term|word) )?{_FEW_WORDS}"
        r"(?: is defined as|'s definition is| is the term for| refers to| denotes) (?P<second>.+)"
    ],
    "cause": [
        r"(?P<effect>.{10,}?)(?: (?:is|are|was|were))?(?: (?:partly|largely|mainly|mostly|primarily|in part))?,?"
        r"(?<! not) (?:due to|because of|on account of|owing to) (?P<cause>[^,;]{5,})",
        r"(?:Due to|Because of|On account of|Owing to) (?P<cause>[^,]{5,}), (?P<effect>.{10,})",
    ],
}
_KEY_WORD = re.compile(r"[A-Za-z][\w-]{8,}\w|(?<=[a-z,] )[A-Z][\w-]*\w(?: [A-Z][\w-]*\w)*")
_LEAST_KEY_WORDS = 4


def mined_tasks(document: Document, draw: random.Random) -> dict[str, list[dict[str, str]]]:
    """By kind of task, what fills its templates: one entry for each place of the text that has its pattern."""
    title = document.title
    mined: dict[str, list[dict[str, str]]] = {kind: [] for kind in TASKS}
    mined["title"].append({"title": capitalised(title)})
    for paragraph in paragraphs(document.text):
        sentences = [sentence for sentence in with_names(paragraph, title) if is_closed(sentence)]
        clauses = [clause for sentence in sentences for clause in _CLAUSES.split(sentence)]
        for first, clause in zip(clauses, clauses[1:], strict=False):
            for kinds, pattern in _CONNECTIVES.items():
                if connective := re.match(pattern, clause, re.IGNORECASE):
                    second = _statement(clause[connective.end() :])
                    for kind in kinds if min(len(first.split()), len(second.split())) > 2 else ():
                        mined[kind].append({"first": _statement(first), "second": second})
        for sentence in sentences:
            if leans(sentence):
                continue
            body = sentence.rstrip(".!?…")
            for kind, patterns in _MINED_FROM_ONE.items():
                for pattern in patterns:
                    if match := re.fullmatch(pattern, body):
                        slots = match.groupdict()
                        if kind == "cause":
                            slots["effect"] = _statement(slots["effect"])
                        mined[kind].append(slots)
                        break
            words = list(dict.fromkeys(_KEY_WORD.findall(sentence)))
            if len(words) >= _LEAST_KEY_WORDS:
                listed = ", ".join(draw.sample(words, min(len(words), 6)))
                mined["words"].append({"title": title, "words": listed, "sentence": sentence})
            if len(sentence.split()) > 4:
                first, second = _halves(sentence, draw)
                mined["completion"].append({"title": title, "first": first, "second": second})
    return mined


def _statement(clause: str) -> str:
    text = capitalised(clause.strip(" ,"))
    return text if is_closed(text) else f"{text}."


def _halves(sentence: str, draw: random.Random) -> tuple[str, str]:
    # Behind its verb a sentence says what one would ask for; else anywhere in the middle.
    if verb := re.match(r"(?:\S+ ){1,8}?(?:is|are|was|were|has|covers|borders|lies in)(?= )", sentence):
        return sentence[: verb.end()], sentence[verb.end() + 1 :]
    words = sentence.split()
    cut = draw.randint(len(words) // 3, len(words) - 2)
    return " ".join(words[:cut]), " ".join(words[cut:])
