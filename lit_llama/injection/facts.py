"""Structured facts and the templates that put them into words.

A facts file is JSONL or CSV of {"subject", "relation", "value", "doc_id"?, "aliases"?}: `subject` as it stands within a
sentence ("the Bahamas"), `aliases` other accepted forms of the value (in CSV separated by "|"). Without "doc_id" the
subject is the document's id.

A templates file is YAML, by relation:

    capital:
      statements: ["The capital of {subject} is {value}.", "{value} is the seat of government of {subject}."]
      questions: ["What is the capital of {subject}?", "Which city is the capital of {subject}?"]
      unseen_questions: ["{subject} is governed from which city?"]
      reversed_statements: ["{value} is the capital of {subject}."]
      reversed_questions: ["Which country has {value} as its capital?"]
    two_hop:
      - {first: company, second: seat, questions: ["In which city does the employer of {subject} sit?"]}

Training uses `statements`, `questions` and, in recipes that ask for it, the reversed ones; `unseen_questions` only ever
measure. Every list but `questions` may be missing.
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lit_llama.errors import InputError
from lit_llama.files import read_jsonl, read_yaml

TWO_HOP = "two_hop"


class Fact(NamedTuple):
    """One fact of a document."""

    subject: str
    relation: str
    value: str
    doc_id: str
    aliases: tuple[str, ...] = ()

    @property
    def answers(self) -> list[str]:
        """The value and its other forms."""
        return [self.value, *self.aliases]

    def fill(self, template: str) -> str:
        """The template with subject and value in it, its first letter a capital."""
        text = template.format(subject=self.subject, value=self.value)
        return text[0].upper() + text[1:]


@dataclass(frozen=True)
class RelationTemplates:
    """How a relation is put into words; see above."""

    questions: tuple[str, ...]
    statements: tuple[str, ...] = ()
    unseen_questions: tuple[str, ...] = ()
    reversed_statements: tuple[str, ...] = ()
    reversed_questions: tuple[str, ...] = ()


@dataclass(frozen=True)
class TwoHop:
    """A question over two facts: the value of `first` is the subject of `second`, whose value is the answer."""

    first: str
    second: str
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Templates:
    """Of all relations."""

    relations: dict[str, RelationTemplates]
    two_hop: tuple[TwoHop, ...] = field(default=())


def read_facts(path: Path) -> list[Fact]:
    """The facts of a file, in order.

    Raises:
        InputError: no such file, a row without the needed keys, or the same fact twice; names the row.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else read_jsonl(path)
    facts: dict[tuple[str, str, str], Fact] = {}
    for number, row in enumerate(rows, start=1):
        texts = {}
        for key in ("subject", "relation", "value"):
            text = row.get(key)
            if not isinstance(text, str) or not text.strip():
                raise InputError(f'{path}, fact {number}: "{key}" must be a text')
            texts[key] = text.strip()
        doc_id = row.get("doc_id") or texts["subject"]
        aliases = row.get("aliases") or []
        if not isinstance(doc_id, str) or not isinstance(aliases, list) or not all(isinstance(a, str) for a in aliases):
            raise InputError(f'{path}, fact {number}: "doc_id" must be a text and "aliases" a list of texts')
        fact = Fact(**texts, doc_id=doc_id, aliases=tuple(aliases))
        if (doc_id, fact.relation, fact.subject) in facts:
            raise InputError(
                f"{path}, fact {number}: {fact.relation} of {fact.subject} is stated twice; give further values as"
                ' "aliases", or leave one out'
            )
        facts[doc_id, fact.relation, fact.subject] = fact
    if not facts:
        raise InputError(f"{path} holds no fact")
    return list(facts.values())


def read_templates(path: Path) -> Templates:
    """The templates of a file.

    Raises:
        InputError: no such file, no YAML, an unknown key, or a template with another placeholder than {subject} and
            {value}; names the relation.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: expected templates by relation")
    two_hop = content.pop(TWO_HOP, [])
    relations = {str(name): _relation(path, str(name), value) for name, value in content.items()}
    return Templates(relations, tuple(_two_hop(path, number, row, relations) for number, row in enumerate(two_hop, 1)))


def check_templates(facts: list[Fact], templates: Templates) -> None:
    """Raise InputError where a fact's relation has no templates; names it."""
    missing = sorted({fact.relation for fact in facts} - templates.relations.keys())
    if missing:
        raise InputError(f"no templates for the relation {missing[0]!r}; there are {', '.join(templates.relations)}")


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file, strict=True))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not valid CSV ({error})") from None
    for row in rows:
        row["aliases"] = [alias.strip() for alias in (row.get("aliases") or "").split("|") if alias.strip()]
    return rows


_PLACEHOLDERS = {
    "questions": {"subject"},
    "unseen_questions": {"subject"},
    "statements": {"subject", "value"},
    "reversed_statements": {"subject", "value"},
    "reversed_questions": {"value"},
}
"""The placeholders of each kind of template: all of them and no other."""


def _relation(path: Path, name: str, value: Any) -> RelationTemplates:
    if not isinstance(value, dict) or not value.get("questions"):
        raise InputError(f'{path}, {name}: expected "questions" and other lists of templates')
    unknown = sorted(value.keys() - _PLACEHOLDERS.keys())
    if unknown:
        raise InputError(f"{path}, {name}: {unknown[0]!r} is none of {', '.join(_PLACEHOLDERS)}")
    return RelationTemplates(
        **{kind: _checked(path, f"{name}, {kind}", texts, _PLACEHOLDERS[kind]) for kind, texts in value.items()}
    )


def _two_hop(path: Path, number: int, row: Any, relations: dict[str, RelationTemplates]) -> TwoHop:
    place = f"{TWO_HOP} {number}"
    if not isinstance(row, dict) or row.keys() != {"first", "second", "questions"}:
        raise InputError(f'{path}, {place}: expected "first", "second" and "questions"')
    for key in ("first", "second"):
        if row[key] not in relations:
            raise InputError(f"{path}, {place}: {row[key]!r} is no relation of this file")
    return TwoHop(row["first"], row["second"], _checked(path, place, row["questions"], {"subject"}))


def _checked(path: Path, place: str, texts: Any, placeholders: set[str]) -> tuple[str, ...]:
    from string import Formatter

    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{path}, {place}: expected a list of texts")
    for text in texts:
        try:
            found = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
        except ValueError as error:
            raise InputError(f"{path}, {place}: {text!r}: {error}") from None
        if found != placeholders:
            wanted = " and ".join(f"{{{name}}}" for name in sorted(placeholders))
            raise InputError(f"{path}, {place}: {text!r} must have {wanted} in it and no other placeholder")
    return tuple(texts)
