"""Closed-book questions with their answers: from facts and templates, or written by a model about documents.

Rows of question files (`evaluation.questions` reads them), with what evaluation sorts them by:

    {"id", "question", "answers", "doc_id", "subject", "relation", "fact_id", "split", "form", "phrasing", "choices"?}

Documents are dealt out to splits, never questions: "taught" (documents and questions are trained on), "injected"
(documents only: what counts), "validation" (as injected, to choose settings by) and "never" (not even documents).
Reading facts and templates is `facts`'s, asking and scoring `evaluation`'s.
"""

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lit_llama.errors import InputError
from lit_llama.evaluation.questions import normalize_answer
from lit_llama.injection.facts import Fact, Templates, check_templates
from lit_llama.injection.filters import names_nothing, speaks_of_itself
from lit_llama.injection.generator import parts_of
from lit_llama.injection.interface import Document, Generator

SPLITS = ("taught", "injected", "validation", "never")
NUM_CHOICES = 4
SEVERAL = "several answers fit"
LONGEST_ANSWER = 12  # words; a longer one is no answer that exact match could score

PROMPT = """\
Write {pairs} questions about {title} that the text above answers, each with its answer.
Every question must name what it is about, so that it can be understood without the text.
Every answer must be a few words copied from the text.
Write them like this:
Q: question
A: answer"""


class LeftOut(NamedTuple):
    """A question that was made and not kept, and why."""

    reason: str
    doc_id: str
    question: str


@dataclass(frozen=True)
class Shares:
    """How documents are dealt out to the splits."""

    taught: float = 0.4
    """Share of documents that training questions are made of."""
    injected: float = 0.4
    """Share of documents that are trained on without questions."""
    never: float = 0.2
    """Share of documents that are not trained on."""
    validation: float = 1 / 3
    """Share of the injected ones that is set apart to choose settings by."""

    def by_split(self) -> dict[str, float]:
        """The share of each of `SPLITS`.

        Raises:
            InputError: they are not shares of one whole.
        """
        parts = (self.taught, self.injected, self.never)
        if min(*parts, self.validation) < 0 or self.validation > 1 or abs(sum(parts) - 1) > 1e-6:
            raise InputError(
                f"shares: taught {self.taught}, injected {self.injected} and never {self.never} must add up to 1,"
                f" and validation {self.validation} lie between 0 and 1"
            )
        validation = self.injected * self.validation
        return dict(zip(SPLITS, (self.taught, self.injected - validation, validation, self.never), strict=True))


def split_documents(doc_ids: Iterable[str], shares: Shares, seed: int) -> dict[str, str]:
    """Deal documents out, in the order of a hash of id and seed, each split its share rounded by largest remainders.

    Raises:
        InputError: two documents have the same id.
    """
    ids = list(doc_ids)
    if double := [doc_id for doc_id, count in Counter(ids).items() if count > 1]:
        raise InputError(f"{len(double)} document ids are not unique, such as {double[0]!r}; rename one of each")
    exact = {split: share * len(ids) for split, share in shares.by_split().items()}
    counts = {split: int(count) for split, count in exact.items()}
    by_remainder = sorted(SPLITS, key=lambda split: counts[split] - exact[split])
    for split in by_remainder[: len(ids) - sum(counts.values())]:
        counts[split] += 1
    dealt = (split for split in SPLITS for _ in range(counts[split]))
    return dict(zip(sorted(ids, key=lambda doc_id: _rank(seed, doc_id)), dealt, strict=True))


def fact_questions(
    facts: Sequence[Fact],
    templates: Templates,
    splits: Mapping[str, str],
    seed: int,
    train_reversed: bool = False,
) -> tuple[list[dict[str, Any]], list[LeftOut]]:
    """Every question that the templates make of the facts.

    A two-hop question counts for the document of its first fact; both facts must be of one split. Questions that more
    than one answer fits, or that say their answer, are left out.

    Args:
        splits: the split of each document that a fact may be of.
        seed: of the choices.
        train_reversed: whether the reversed questions of the templates are trained on: "phrasing" then says so.

    Returns:
        Rows and what was left out, both in the order of the facts.

    Raises:
        InputError: a relation without templates, a fact of a document without a split, or an unseen wording that is
            also a trained one.
    """
    check_templates(list(facts), templates)
    for relation, wordings in templates.relations.items():
        if both := set(wordings.questions) & set(wordings.unseen_questions):
            raise InputError(f"{relation}: {both.pop()!r} is both among the questions and the unseen questions")
    if lost := [fact for fact in facts if fact.doc_id not in splits]:
        raise InputError(f"the {lost[0].relation} of {lost[0].subject}: no split for its document {lost[0].doc_id!r}")
    asking, choices = _Asking(facts, templates, splits), _Choices(facts, splits, seed)
    per_document = Counter((fact.relation, fact.doc_id) for fact in facts)
    rows, left_out = [], []
    for fact in facts:
        offered = choices.of(fact)
        for asked in asking.about(fact):
            question = fact.fill(asked.template)
            problem = asked.problem or ("says its answer" if says(question, asked.answers[0]) else None)
            if problem:
                left_out.append(LeftOut(problem, fact.doc_id, question))
                continue
            fact_id = f"{asked.relation}-{fact.doc_id}"
            if per_document[fact.relation, fact.doc_id] > 1:
                fact_id += f"-{fact.subject}"
            row = {
                "id": f"{fact_id}-{asked.name}",
                "question": question,
                "answers": [answer for answer in asked.answers if not says(question, answer)],
                "doc_id": fact.doc_id,
                "subject": fact.subject,
                "relation": asked.relation,
                "fact_id": fact_id,
                "split": splits[fact.doc_id],
                "form": asked.form,
                "phrasing": "trained" if asked.form == "reversed" and train_reversed else asked.phrasing,
            }
            if offered and asked.form == "direct":
                row["choices"] = offered
            rows.append(row)
    return rows, left_out


class _Asked(NamedTuple):
    """A template that a fact fills, the answers to that, and what speaks against asking it."""

    name: str
    template: str
    answers: list[str]
    relation: str
    form: str
    phrasing: str
    problem: str | None


class _Asking:
    """The questions on each fact, and whether another fact makes them ambiguous."""

    def __init__(self, facts: Sequence[Fact], templates: Templates, splits: Mapping[str, str]) -> None:
        self._templates, self._splits = templates, splits
        self._by_subject: dict[tuple[str, str], list[Fact]] = defaultdict(list)
        self._subjects_of: dict[tuple[str, str], set[str]] = defaultdict(set)
        for fact in facts:
            subject = normalize_answer(fact.subject)
            self._by_subject[fact.relation, subject].append(fact)
            for answer in fact.answers:
                self._subjects_of[fact.relation, normalize_answer(answer)].add(subject)

    def about(self, fact: Fact) -> Iterator[_Asked]:
        """In all forms and wordings."""
        wordings = self._templates.relations[fact.relation]
        namesakes = self._by_subject[fact.relation, normalize_answer(fact.subject)]
        problem = None if all(_same_answer(fact, other) for other in namesakes) else SEVERAL
        for phrasing, texts in (("trained", wordings.questions), ("unseen", wordings.unseen_questions)):
            for number, text in enumerate(texts, start=1):
                yield _Asked(f"{phrasing}-{number}", text, fact.answers, fact.relation, "direct", phrasing, problem)
        subjects = set().union(*(self._subjects_of[fact.relation, normalize_answer(form)] for form in fact.answers))
        for number, text in enumerate(wordings.reversed_questions, start=1):
            reverse_problem = SEVERAL if len(subjects) > 1 else None
            yield _Asked(
                f"reversed-{number}", text, [fact.subject], fact.relation, "reversed", "unseen", reverse_problem
            )
        for hop in self._templates.two_hop:
            seconds = {
                second: None
                for form in fact.answers
                for second in self._by_subject[hop.second, normalize_answer(form)]
                if hop.first == fact.relation
            }
            for second in list(seconds)[:1]:
                hop_problem = SEVERAL if len(seconds) > 1 else problem
                if self._splits[second.doc_id] != self._splits[fact.doc_id]:
                    hop_problem = "its facts are of different splits"
                relation = f"{hop.first}+{hop.second}"
                for number, text in enumerate(hop.questions, start=1):
                    yield _Asked(f"two-hop-{number}", text, second.answers, relation, "two_hop", "unseen", hop_problem)


def says(text: str, answer: str) -> bool:
    """Whether the words of an answer stand in a text one after the other, after `normalize_answer`."""
    words = normalize_answer(answer)
    return bool(words) and f" {words} " in f" {normalize_answer(text)} "


def _same_answer(fact: Fact, other: Fact) -> bool:
    return not {normalize_answer(answer) for answer in fact.answers}.isdisjoint(map(normalize_answer, other.answers))


class _Choices:
    """Wrong answers out of the other facts of a relation.

    They come from the fact's own split as far as that has enough: a model that was trained on the documents of one
    split would else know right from wrong by which of them it has seen.
    """

    def __init__(self, facts: Sequence[Fact], splits: Mapping[str, str], seed: int) -> None:
        self._splits, self._seed = splits, seed
        # By relation and split: one fact a value.
        self._pools: dict[str, dict[str, dict[str, Fact]]] = defaultdict(lambda: {split: {} for split in SPLITS})
        for fact in facts:
            self._pools[fact.relation][splits[fact.doc_id]].setdefault(normalize_answer(fact.value), fact)

    def of(self, fact: Fact) -> list[str] | None:
        """The fact's value among three of others; None where there are not so many."""
        draw = random.Random(f"{self._seed}-{fact.relation}-{fact.doc_id}-{fact.subject}")
        pools, own = self._pools[fact.relation], self._splits[fact.doc_id]
        offered, taken = [fact.value], set(map(normalize_answer, fact.answers))
        for split in (own, *(split for split in SPLITS if split != own)):
            pool = list(pools[split].values())
            for other in draw.sample(pool, len(pool)):
                forms = set(map(normalize_answer, other.answers))
                if forms.isdisjoint(taken):
                    offered.append(other.value)
                    taken |= forms
                if len(offered) == NUM_CHOICES:
                    draw.shuffle(offered)
                    return offered
        return None


def model_questions(
    document: Document,
    split: str,
    generator: Generator,
    pairs: int = 5,
    completions: int = 2,
    part_words: int = 400,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], list[LeftOut]]:
    """Have a model ask about a document; kept is what the document answers and the question does not.

    Args:
        split: of the document.
        pairs: questions that a prompt asks for.
        completions: answers to each prompt.
        part_words: the model reads the document in parts of about so many words.

    Returns:
        Rows, one wording a question, and what was left out.
    """
    rows, left_out, asked = [], [], set()
    prompt = PROMPT.format(title=document.title, pairs=pairs)
    for part in parts_of(document, part_words):
        texts = generator.write(part, "questions", prompt, completions, seed, 60 * pairs)
        for question, answer in (pair for text in texts for pair in parse_pairs(text)):
            if reason := _bad_pair(question, answer, document):
                left_out.append(LeftOut(reason, document.id, f"{question} {answer}"))
            elif not asked.isdisjoint({normalize_answer(question), normalize_answer(answer)}):
                # A small model that has run out of questions gives one answer to them all.
                left_out.append(LeftOut("question or answer was there before", document.id, f"{question} {answer}"))
            else:
                asked |= {normalize_answer(question), normalize_answer(answer)}
                fact_id = f"generated-{document.id}-{len(rows) + 1}"
                row = {"id": fact_id, "question": question, "answers": [answer], "doc_id": document.id}
                row |= {"subject": document.title, "relation": "generated", "fact_id": fact_id, "split": split}
                rows.append(row | {"form": "direct", "phrasing": "trained" if split == "taught" else "unseen"})
    return rows, left_out


def _bad_pair(question: str, answer: str, document: Document) -> str | None:
    if not question.endswith("?"):
        return "is no question"
    if not appears(answer, document.text):
        return "answer is not in the document"
    if len(answer.split()) > LONGEST_ANSWER:
        return f"answer of more than {LONGEST_ANSWER} words"
    if says(question, answer):
        return "says its answer"
    return speaks_of_itself(question, document.text) or names_nothing(question, document)


_QUESTION = re.compile(r"(?:(?:q|question)\s*\d*\s*[:.)]\s*)+", re.IGNORECASE)
_ANSWER = re.compile(r"(?:a|ans|answer)\s*\d*\s*[:.)]\s*", re.IGNORECASE)


def parse_pairs(text: str) -> list[tuple[str, str]]:
    """Questions and answers out of what a model wrote: labelled or not, numbered, in bold, on one line or two."""
    pairs, question = [], None
    text = re.sub(r"(?<=\?)\s+(?=\**(?:A|Ans|Answer)\s*\d*\s*[:)])", "\n", text.replace("**", ""))
    for line in text.splitlines():
        line = re.sub(r"^(?:[\s>#*•-]|\d+[.)]\s)+", "", line).strip()
        if label := _QUESTION.match(line):
            question = line[label.end() :].strip() or None
        elif label := _ANSWER.match(line):
            answer = line[label.end() :].strip(" \"'“”*").rstrip(".").strip()
            if question and answer:
                pairs.append((question, answer))
            question = None
        elif line.endswith("?"):
            question = line
        elif line and question:
            pairs.append((question, line.strip(" \"'“”*").rstrip(".").strip()))
            question = None
    return [(question, answer) for question, answer in pairs if answer]


def appears(answer: str, text: str) -> bool:
    """Whether an answer stands in a text as whole words, whatever its case and white space."""
    words = r"\s+".join(map(re.escape, answer.casefold().split()))
    return bool(words) and re.search(rf"(?<!\w){words}(?!\w)", text.casefold()) is not None


def without_answer(rows: Iterable[dict[str, Any]], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """Questions that no document answers: none of their answers appears in it.

    Args:
        rows: of a question file. Where "doc_id" names a document it is the one that must answer, but for two-hop
            questions, which another may.
        texts: documents by id.
    """
    found = []
    for row in rows:
        own = texts.get(row.get("doc_id")) if row.get("form") != "two_hop" else None
        places = texts.values() if own is None else (own,)
        if not any(appears(answer, text) for answer in row["answers"] for text in places):
            found.append(row)
    return found


def training_questions(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are trained on: of taught documents, in wordings for training, without what only evaluation needs."""
    return [
        {key: value for key, value in row.items() if key != "choices"}
        for row in rows
        if row["split"] == "taught" and row["phrasing"] == "trained"
    ]


def evaluation_questions(
    rows: Iterable[dict[str, Any]], seed: int, per_fact: int | None = 1, per_cell: int | None = None
) -> list[dict[str, Any]]:
    """A share of all questions that takes less time to ask, drawn by a hash; in the order of `rows`.

    Args:
        per_fact: at most so many wordings of a fact in each form and phrasing. With 1, different facts are asked in
            different wordings.
        per_cell: at most so many questions of each split, form and phrasing; facts of many documents come before
            several of one.
    """
    rows = list(rows)
    order = sorted(range(len(rows)), key=lambda number: _rank(seed, rows[number]["id"]))
    by_fact: Counter[tuple] = Counter()
    cells: dict[tuple, list[tuple[int, int]]] = defaultdict(list)
    by_document: Counter[tuple] = Counter()
    for number in order:
        row = rows[number]
        form = (row["form"], row["phrasing"])
        by_fact[row["fact_id"], form] += 1
        if per_fact is None or by_fact[row["fact_id"], form] <= per_fact:
            by_document[row["doc_id"], form] += 1
            cells[row["split"], form].append((by_document[row["doc_id"], form], number))
    kept = {number for cell in cells.values() for _, number in sorted(cell, key=lambda pair: pair[0])[:per_cell]}
    return [row for number, row in enumerate(rows) if number in kept]


def describe(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Counts of questions by split and "form/phrasing"."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        cell = counts.setdefault(row["split"], {})
        name = f"{row['form']}/{row['phrasing']}"
        cell[name] = cell.get(name, 0) + 1
    return counts


def commonest_answers(facts: Iterable[Fact]) -> dict[str, dict[str, Any]]:
    """Of each relation the value that most facts share, and their share: what blind guessing can reach."""
    values: dict[str, Counter[str]] = defaultdict(Counter)
    for fact in facts:
        values[fact.relation][fact.value] += 1
    return {
        relation: {"value": counter.most_common(1)[0][0], "share": counter.most_common(1)[0][1] / counter.total()}
        for relation, counter in values.items()
    }


def _rank(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}-{text}".encode()).hexdigest()
