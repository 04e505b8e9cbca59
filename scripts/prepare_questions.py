"""Make closed-book questions about documents, to train on and to measure by: from facts, or asked by a model."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_llama.command_line import StatusLine, run
from lit_llama.errors import InputError
from lit_llama.evaluation.questions import read_questions
from lit_llama.files import atomic_directory, read_json, refuse_overwrite, write_json
from lit_llama.hardware import pick_device
from lit_llama.injection.facts import read_facts, read_templates
from lit_llama.injection.generator import GeneratorConfig, load_generator
from lit_llama.injection.interface import Document
from lit_llama.injection.preparation import read_documents
from lit_llama.injection.question_building import (
    NUM_CHOICES,
    SPLITS,
    LeftOut,
    Shares,
    commonest_answers,
    describe,
    evaluation_questions,
    fact_questions,
    model_questions,
    split_documents,
    training_questions,
    without_answer,
)

SHOWN = 5


@dataclass(kw_only=True)
class Arguments:
    """Make questions about documents: from facts and templates, by a model (--generator.checkpoint_dir), or both.

    out_dir gets train_questions.jsonl and questions.jsonl (for evaluation), splits.json and report.json; with
    --documents also documents/, to inject, and never/, which nothing is to be trained on.
    """

    out_dir: Path
    """Folder to write."""
    facts_file: Path | None = None
    """What the documents say, as data: JSONL or CSV of subject, relation, value, doc_id."""
    templates_file: Path | None = None
    """Questions for the facts' relations (YAML)."""
    documents: Path | list[Path] | None = None
    """Files and folders of documents; questions that none of them answers are reported."""
    question_files: Path | list[Path] | None = None
    """Further question files, for evaluation; a row without "split" gets that of its document."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """The model that asks about the documents; none without its checkpoint_dir."""
    pairs: int = 5
    """Questions that the model is asked for at a time."""
    completions: int = 2
    """How often it is asked about each part of a document."""
    part_words: int = 400
    """Words of a document that it sees at a time."""
    shares: Shares = field(default_factory=Shares)
    """How documents are dealt out to splits."""
    splits_file: Path | None = None
    """The split of each document instead, as {id: split} in JSON: splits.json of an earlier call, or by hand."""
    train_reversed: bool = False
    """Train on the reversed questions too."""
    wordings_per_fact: int | None = 1
    """Evaluate with so many wordings of a fact, of the trained and of the unseen ones; null for all."""
    questions_per_cell: int | None = None
    """Evaluate with at most so many questions of each split, form and phrasing."""
    drop_unanswered: bool = False
    """Leave out questions whose answers appear in no document."""
    seed: int = 0
    """Of splits, choices and draws."""
    device: str = "auto"
    """Where the model runs: cpu, cuda, mps, or auto for the best there is."""
    overwrite: bool = False
    """Replace the folder."""


def main(arguments: Arguments) -> None:
    refuse_overwrite(arguments.out_dir, arguments.overwrite)
    by_model = arguments.generator.checkpoint_dir is not None
    if (arguments.facts_file is None) != (arguments.templates_file is None):
        raise InputError("facts need templates: give both --facts_file and --templates_file")
    if arguments.facts_file is None and not by_model:
        raise InputError("no questions: give --facts_file with --templates_file, or --generator.checkpoint_dir")
    if by_model and arguments.documents is None:
        raise InputError("--generator.checkpoint_dir needs --documents to ask about")
    for name in ("pairs", "completions", "part_words", "wordings_per_fact", "questions_per_cell"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} must be at least 1")

    documents = [] if arguments.documents is None else read_documents(as_list(arguments.documents))
    facts = [] if arguments.facts_file is None else read_facts(arguments.facts_file)
    report: dict[str, Any] = {}
    if documents:
        ids = {document.id for document in documents}
        report["facts_without_document"] = sorted({fact.doc_id for fact in facts} - ids)
        facts = [fact for fact in facts if fact.doc_id in ids]
        if arguments.facts_file is not None and not facts:
            raise InputError(f"{arguments.facts_file}: no fact has the doc_id of a document, such as {min(ids)!r}")
    doc_ids = [document.id for document in documents] or list(dict.fromkeys(fact.doc_id for fact in facts))
    splits = read_splits(arguments, doc_ids)

    rows, left_out = [], []
    if facts:
        templates = read_templates(arguments.templates_file)
        rows, left_out = fact_questions(facts, templates, splits, arguments.seed, arguments.train_reversed)
    if by_model:
        made, refused = ask(arguments, documents, splits)
        rows, left_out = rows + made, left_out + refused
        report["generated"] = {"kept": len(made), "left_out": len(refused)}
    rows += given_questions(arguments, splits)
    if doubles := [row_id for row_id, count in Counter(row["id"] for row in rows).items() if count > 1]:
        raise InputError(f"the question id {doubles[0]!r} is there twice; rename it where --question_files have it")
    texts = {document.id: document.text for document in documents}
    unanswered = without_answer(rows, texts) if documents else []
    if arguments.drop_unanswered:
        dropped = {row["id"] for row in unanswered}
        rows = [row for row in rows if row["id"] not in dropped]
    training = training_questions(rows)
    asked = evaluation_questions(rows, arguments.seed, arguments.wordings_per_fact, arguments.questions_per_cell)
    if not asked:
        raise InputError(f"no question is left: {summary(left_out)}")
    report |= {
        "documents": {split: list(splits.values()).count(split) for split in SPLITS},
        "training_questions": len(training),
        "questions": describe(asked),
        "without_choices": sum(row["form"] == "direct" and "choices" not in row for row in asked),
        "commonest_answers": commonest_answers(facts),
        "left_out": [entry._asdict() for entry in left_out],
        "answer_in_no_document": [{key: row[key] for key in ("id", "question", "answers")} for row in unanswered],
    }
    with atomic_directory(arguments.out_dir, arguments.overwrite) as directory:
        # An empty question file is none: whoever reads one refuses it.
        if training:
            write_rows(directory / "train_questions.jsonl", training)
        write_rows(directory / "questions.jsonl", asked)
        write_json(directory / "splits.json", splits)
        write_json(directory / "report.json", report)
        write_documents(directory, documents, splits)
    print(described(report, left_out, arguments))


def read_splits(arguments: Arguments, doc_ids: list[str]) -> dict[str, str]:
    """By hash, or as the user's file says."""
    if arguments.splits_file is None:
        return split_documents(doc_ids, arguments.shares, arguments.seed)
    given = read_json(arguments.splits_file)
    if not isinstance(given, dict) or not set(map(str, given.values())) <= set(SPLITS):
        raise InputError(f"{arguments.splits_file}: expected {{document id: split}}, splits {', '.join(SPLITS)}")
    if missing := [doc_id for doc_id in doc_ids if doc_id not in given]:
        raise InputError(f"{arguments.splits_file}: no split for {len(missing)} documents, such as {missing[0]!r}")
    return {doc_id: given[doc_id] for doc_id in doc_ids}


def ask(
    arguments: Arguments, documents: list[Document], splits: dict[str, str]
) -> tuple[list[dict[str, Any]], list[LeftOut]]:
    """Questions by the model on every document."""
    config = arguments.generator
    generator = load_generator(config, config.checkpoint_dir, pick_device(arguments.device))
    rows, left_out, line = [], [], StatusLine()
    for number, document in enumerate(documents, start=1):
        made, refused = model_questions(
            document, splits[document.id], generator, arguments.pairs, arguments.completions, arguments.part_words,
            arguments.seed,
        )  # fmt: skip
        rows, left_out = rows + made, left_out + refused
        text = f"{number} of {len(documents)} documents asked about: {len(rows)} questions, {len(left_out)} left out"
        line.show(text, last=number == len(documents))
    line.clear()
    return rows, left_out


def given_questions(arguments: Arguments, splits: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of the user's own question files, with what evaluation needs to know of them."""
    rows = []
    for path in [] if arguments.question_files is None else as_list(arguments.question_files):
        for row in read_questions(path):
            split = row.get("split") or splits.get(row.get("doc_id"))
            if split is None:
                raise InputError(f'{path}, question {row["id"]!r}: give it a "split" or the "doc_id" of a document')
            defaults = {"relation": "given", "fact_id": str(row["id"]), "form": "direct"}
            # Whatever its wording, nothing trains on it.
            rows.append(defaults | row | {"split": split, "phrasing": "unseen"})
    return rows


def write_documents(directory: Path, documents: list[Document], splits: dict[str, str]) -> None:
    """What to inject and what not, as text files that are named by id."""
    for document in documents:
        folder = directory / ("never" if splits[document.id] == "never" else "documents")
        folder.mkdir(exist_ok=True)
        (folder / f"{document.id}.txt").write_text(document.text + "\n", encoding="utf-8")


def described(report: dict[str, Any], left_out: list[LeftOut], arguments: Arguments) -> str:
    """The report as a person reads it."""
    lines = [", ".join(f"{count} {split}" for split, count in report["documents"].items()) + " (documents)"]
    lines.append(f"{report['training_questions']:,} training questions")
    if not report["training_questions"]:
        lines[-1] += ": no document is taught, or no question on it was kept; recipes that need questions cannot run"
    for split, cells in report["questions"].items():
        lines.append(f"{split:<12}" + ", ".join(f"{count} {name}" for name, count in cells.items()))
    if left_out:
        lines.append(f"left out: {summary(left_out)}")
    if report["without_choices"]:
        lines.append(f"without choices, for want of {NUM_CHOICES - 1} other values: {report['without_choices']}")
    for name, what in (("facts_without_document", "doc_ids of facts"), ("answer_in_no_document", "questions")):
        found = report.get(name) or []
        if found:
            shown = ", ".join(entry if isinstance(entry, str) else entry["id"] for entry in found[:SHOWN])
            end = ", ..." if len(found) > SHOWN else ""
            lines.append(f"{name.replace('_', ' ')}: {len(found)} {what} ({shown}{end})")
    return "\n".join([*lines, f"written to {arguments.out_dir}, all of this in report.json"])


def summary(left_out: list[LeftOut]) -> str:
    """How many for which reason."""
    reasons = Counter(entry.reason for entry in left_out).most_common()
    return ", ".join(f"{count} ({reason})" for reason, count in reasons) or "none was made"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def as_list(paths: Path | list[Path]) -> list[Path]:
    return paths if isinstance(paths, list) else [paths]


if __name__ == "__main__":
    run(main)
