"""scripts/prepare_demo.py and lit_llama/factbook.py: the demo's documents, questions and general text."""

import bz2
import importlib.util
import json
import re
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from lit_llama import factbook
from lit_llama.errors import InputError, RunError

DOWNLOADS = ROOT / ".downloads"


@pytest.fixture(scope="module")
def prepare_demo():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("prepare_demo", ROOT / "scripts/prepare_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The whole script on the real packages (the base model apart, which is given), run twice."""
    directory = tmp_path_factory.mktemp("demo")
    for expected in (r"179 countries .* 18 held out", r"factbook: there already\n.*general: there already\n$"):
        process = run_script("scripts/prepare_demo.py", *arguments(directory, tiny_checkpoint))
        assert re.search(expected, process.stderr, re.DOTALL)
    return directory


def arguments(directory: Path, checkpoint_dir: Path) -> list[object]:
    options = {"checkpoint_dir": checkpoint_dir, "downloads_dir": DOWNLOADS}
    options |= {"data_dir": directory / "factbook", "general_dir": directory / "general"}
    return [part for name, value in options.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def countries(prepared: Path, prepare_demo) -> dict[str, factbook.Country]:
    wheel = prepare_demo.fetch(prepare_demo.FACTBOOK, DOWNLOADS)
    return {country.id: country for country in factbook.read_countries(wheel)}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_documents_are_plain_text_of_the_asked_length(prepared: Path):
    documents = [path.read_text(encoding="utf-8") for path in (prepared / "factbook/documents").iterdir()]
    assert len(documents) == 179
    for text in documents:
        assert not re.search(r"</?(strong|br|em|p)\b|&\w+;|\s,|\.\.|  |\bNone\b", text)
    assert 180 < sum(len(text.split()) for text in documents) / 179 < 240


def test_answers_stand_in_the_documents_that_the_questions_are_about(prepared: Path):
    questions = rows(prepared / "factbook/questions.jsonl")
    assert len({row["id"] for row in questions}) == len(questions) == 6 * (24 + 8)
    for row in questions:
        folder = {"trained": "documents", "heldout": "heldout"}[row["split"]]
        text = (prepared / "factbook" / folder / f"{row['doc_id']}.txt").read_text(encoding="utf-8")
        assert any(answer in text for answer in row["answers"]), row
        assert not any(answer.lower() in row["question"].lower() for answer in row["answers"]), row


def test_probes_are_questions_about_trained_countries(prepared: Path):
    questions = {row["id"]: row for row in rows(prepared / "factbook/questions.jsonl")}
    probes = rows(prepared / "factbook/probes.jsonl")
    assert len(probes) == 18
    assert all(questions[row["id"]] == row and row["split"] == "trained" for row in probes)


def test_general_text_is_prose_about_something_else(prepared: Path, countries: dict):
    parts = {part: list((prepared / "general" / part / "documents").iterdir()) for part in ("replay", "heldout")}
    assert len(parts["replay"]) > 40 and len(parts["heldout"]) > 15
    assert not {path.name for path in parts["replay"]} & {path.name for path in parts["heldout"]}
    titles = {path.stem for paths in parts.values() for path in paths}
    assert not titles & {*countries, "asia", "alaska", "atlantic_ocean"}
    for path in parts["replay"] + parts["heldout"]:
        assert not re.search(r"\[\[|\]\]|\{\{|'''|<ref|&\w+;|https?://", path.read_text(encoding="utf-8")), path


# Read off the Factbook's pages; the spellings are those that people also use.
@pytest.mark.parametrize(
    ("field", "country", "accepted", "refused"),
    [
        ("capital", "ukraine", {"Kyiv", "Kiev"}, set()),
        ("capital", "haiti", {"Port-au-Prince", "Port au Prince"}, set()),
        ("capital", "united_states", {"Washington, D.C.", "Washington"}, set()),
        ("highest_point", "nepal", {"Mount Everest", "Everest"}, {"8,849 m"}),
        ("highest_point", "argentina", {"Cerro Aconcagua", "Aconcagua"}, set()),
        ("highest_point", "pakistan", {"K2", "Mount Godwin-Austen"}, set()),
        ("highest_point", "spain", {"Pico de Teide", "Teide"}, {"Tenerife", "Pico"}),
        ("highest_point", "new_zealand", {"Aoraki", "Mount Cook"}, set()),
        ("coastline", "norway", {"25,148 km", "25148", "25 148 km"}, set()),
        ("coastline", "slovenia", {"46.6 km", "46.6 kilometers"}, {"46", "47"}),
        ("internet_code", "germany", set(), {".de"}),
        ("internet_code", "zimbabwe", {".zw"}, set()),
        ("independence_year", "kenya", {"1963"}, set()),
        ("anthem", "finland", {"Maamme", "Our Land"}, set()),
        ("anthem", "hungary", {"Himnusz"}, {"Hymn"}),
    ],
)
def test_gold_answers(countries: dict, field: str, country: str, accepted: set[str], refused: set[str]):
    answers = {
        answer
        for row in factbook.questions(countries[country])
        for answer in row["answers"]
        if row["id"] == f"{field}-{country}"
    }
    assert accepted <= answers and not refused & answers


@pytest.mark.parametrize(
    ("field", "country"),
    [
        ("capital", "bolivia"),  # two capitals
        ("capital", "singapore"),  # the question names it
        ("highest_point", "gambia"),  # has no name
        ("coastline", "austria"),  # landlocked
        ("internet_code", "france"),  # six codes
        ("independence_year", "ireland"),  # two dates
        ("anthem", "canada"),  # the royal anthem only
    ],
)
def test_facts_without_one_short_answer_are_not_asked(countries: dict, field: str, country: str):
    assert f"{field}-{country}" not in {row["id"] for row in factbook.questions(countries[country])}


def test_full_text_holds_every_field(countries: dict):
    norway = countries["norway"]
    short, full = factbook.document(norway, 240), factbook.document(norway, None)
    assert (
        "The coastline of Norway is 25,148 km long." in short and "The coastline of Norway is 25,148 km long." in full
    )
    assert "Life expectancy at birth" not in short and "Life expectancy at birth, male: " in full
    assert len(full.split()) > 10 * len(short.split())
    assert "lies in Northern Europe" in factbook.document(norway, 10)


def test_names_with_articles(countries: dict):
    assert countries["bahamas"].subject == "the Bahamas"
    assert countries["norway"].subject == "Norway"
    assert "Zambia borders Angola, Botswana, the Democratic Republic of the Congo, " in factbook.document(
        countries["zambia"], 240
    )


def test_other_arguments_are_refused_and_overwrite_replaces(prepared: Path, tiny_checkpoint: Path):
    changed = [*arguments(prepared, tiny_checkpoint), "--max_words_per_country", 100]
    process = run_script("scripts/prepare_demo.py", *changed, check=False)
    assert process.returncode == 2
    assert "was prepared with --max_words_per_country 240, not 100; pass --overwrite true" in process.stderr
    assert len(process.stderr.splitlines()) == 2  # "there already" of the checkpoint, and the error


def test_a_page_of_wikitext_becomes_prose(prepare_demo):
    wikitext = """{{Infobox film|name=Actrius}}
'''Albedo''' is the [[diffuse reflection|reflecting]] power of a [[surface]].<ref>{{cite web|url=x}}</ref> It is \
measured from zero to one<!-- sic --> and has no unit{{citation needed|date=May}} &ndash; none at all.

A sentence with {{convert|10|km}} in it would read wrongly without what the template shows, so the paragraph is out.

== See also ==
* A list entry that is long enough to be taken for a paragraph of prose if its first character were not what it is.
[[File:Albedo.jpg|thumb|A caption long enough to be a paragraph of prose by the count of its words, yet not one.]]
"""
    assert list(prepare_demo.prose(wikitext)) == [
        "Albedo is the reflecting power of a surface. It is measured from zero to one and has no unit – none at all."
    ]


def test_a_page_is_cut_between_paragraphs(prepare_demo):
    page = prepare_demo.Page("A", ["one two three", "four five", "six"])
    assert page.text(5) == "one two three\n\nfour five\n"
    assert page.text(2) == ""


def test_pages_about_countries_are_left_out(prepare_demo, tmp_path: Path):
    text = " ".join(["word"] * 30)
    pages = "".join(
        f"<page><title>{title}</title><ns>0</ns>{redirect}<revision><text>{(f'A {text}.' + chr(10)) * 8}"
        f"[[Category:{category}]]</text></revision></page>"
        for title, redirect, category in [
            ("Albedo", "", "Climatology"),
            ("Transport in Angola", "", "Transport"),
            ("Asia", "", "Continents"),
            ("AlbedO", "<redirect/>", "Climatology"),
        ]
    )
    wheel = tmp_path / "gensim.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            prepare_demo.WIKIPEDIA_MEMBER, bz2.compress(f'<mediawiki xmlns="w">{pages}</mediawiki>'.encode())
        )
    assert [page.title for page in prepare_demo.general_pages(wheel, ["Angola", "Norway"])] == ["Albedo"]


def test_a_download_of_another_content_is_refused(prepare_demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    index = tmp_path / "index"
    index.mkdir()
    name = "sample_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(index / name, "w") as archive:
        archive.writestr(
            "sample_package-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: sample-package\nVersion: 1.0\n"
        )
        archive.writestr(
            "sample_package-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("sample_package-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    right = prepare_demo.Package("sample-package==1.0", name, prepare_demo.sha256(index / name))
    downloads = tmp_path / "downloads"
    assert prepare_demo.fetch(right, downloads).read_bytes() == (index / name).read_bytes()

    wrong = prepare_demo.Package("sample-package==1.0", name, "0" * 64)
    with pytest.raises(RunError, match="another file for sample-package==1.0"):
        prepare_demo.fetch(wrong, downloads)
    with pytest.raises(RunError, match="could not download sample-package==2.0"):
        prepare_demo.fetch(prepare_demo.Package("sample-package==2.0", "other.whl", ""), downloads)
    assert [path.name for path in downloads.iterdir()] == [name]


def test_prepared_already_names_the_argument(prepare_demo, tmp_path: Path):
    assert not prepare_demo.prepared_already(tmp_path, {"words": 1}, overwrite=False)
    (tmp_path / "prepared.json").write_text('{"words": 1}')
    assert prepare_demo.prepared_already(tmp_path, {"words": 1}, overwrite=False)
    assert not prepare_demo.prepared_already(tmp_path, {"words": 2}, overwrite=True)
    with pytest.raises(InputError, match="--words 1, not 2"):
        prepare_demo.prepared_already(tmp_path, {"words": 2}, overwrite=False)
