"""lit_llama/injection/question_building.py, scripts/prepare_questions.py and benchmarks/injection/domains.py."""

import importlib
import importlib.util
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from lit_llama.errors import InputError
from lit_llama.evaluation.questions import read_questions
from lit_llama.injection.facts import Fact, RelationTemplates, Templates, TwoHop, read_templates
from lit_llama.injection.interface import Document
from lit_llama.injection.question_building import (
    Shares,
    appears,
    commonest_answers,
    describe,
    evaluation_questions,
    fact_questions,
    model_questions,
    parse_pairs,
    split_documents,
    training_questions,
    without_answer,
)

CAPITAL = RelationTemplates(
    questions=("What is the capital of {subject}?", "Which city governs {subject}?"),
    unseen_questions=("{subject} is governed from which city?",),
    reversed_questions=("Which country has {value} as its capital?",),
)
RIVER = RelationTemplates(questions=("On which river does {subject} lie?",))
TEMPLATES = Templates(
    {"capital": CAPITAL, "river": RIVER},
    (TwoHop("capital", "river", ("On which river does the capital of {subject} lie?",)),),
)
COUNTRIES = {"Austria": "Vienna", "France": "Paris", "Hungary": "Budapest", "Serbia": "Belgrade", "Egypt": "Cairo"}


def capitals(countries: dict[str, str] = COUNTRIES) -> list[Fact]:
    return [Fact(country, "capital", city, country.lower()) for country, city in countries.items()]


def questions_of(facts: list[Fact], splits: dict[str, str] | None = None, **options: object) -> dict[str, dict]:
    splits = splits or dict.fromkeys((fact.doc_id for fact in facts), "taught")
    return {row["id"]: row for row in fact_questions(facts, TEMPLATES, splits, seed=0, **options)[0]}


def test_the_questions_of_one_fact_are_those_written_by_hand():
    rows = questions_of([Fact("the Bahamas", "capital", "Nassau", "bahamas", ("Nassau City",))])
    common = {"doc_id": "bahamas", "subject": "the Bahamas", "relation": "capital", "fact_id": "capital-bahamas"}
    common["split"] = "taught"
    answers = ["Nassau", "Nassau City"]
    assert list(rows.values()) == [
        {"id": "capital-bahamas-trained-1", "question": "What is the capital of the Bahamas?", "answers": answers}
        | common
        | {"form": "direct", "phrasing": "trained"},
        {"id": "capital-bahamas-trained-2", "question": "Which city governs the Bahamas?", "answers": answers}
        | common
        | {"form": "direct", "phrasing": "trained"},
        {"id": "capital-bahamas-unseen-1", "question": "The Bahamas is governed from which city?", "answers": answers}
        | common
        | {"form": "direct", "phrasing": "unseen"},
        {"id": "capital-bahamas-reversed-1", "question": "Which country has Nassau as its capital?"}
        | {"answers": ["the Bahamas"]}
        | common
        | {"form": "reversed", "phrasing": "unseen"},
    ]


@pytest.mark.parametrize(
    ("count", "expected"), [(1, (1, 0, 0, 0)), (2, (1, 1, 0, 0)), (5, (2, 1, 1, 1)), (30, (12, 8, 4, 6))]
)
def test_documents_are_dealt_out_by_largest_remainders(count: int, expected: tuple[int, ...]):
    """Shares 0.4, 4/15, 2/15, 0.2 of 5 are 2, 1.33, 0.67, 1; of 2 they are 0.8, 0.53, 0.27, 0.4."""
    splits = split_documents([f"document-{number}" for number in range(count)], Shares(), seed=0)
    assert tuple(Counter(splits.values())[name] for name in ("taught", "injected", "validation", "never")) == expected


def test_splits_depend_on_ids_and_seed_only():
    ids = [f"document-{number}" for number in range(40)]
    assert split_documents(ids, Shares(), 0) == split_documents(reversed(ids), Shares(), 0)
    assert split_documents(ids, Shares(), 0) != split_documents(ids, Shares(), 1)
    with pytest.raises(InputError, match="1 document ids are not unique, such as 'b'"):
        split_documents(["a", "b", "b"], Shares(), 0)
    for shares in (Shares(taught=0.5), Shares(validation=1.5), Shares(taught=-0.2, injected=1.0)):
        with pytest.raises(InputError, match="must add up to 1"):
            split_documents(ids, shares, 0)


def test_choices_hold_one_right_answer_of_the_own_split_where_it_has_enough():
    facts = [Fact(f"country {number}", "capital", f"city {number}", f"{number}") for number in range(12)]
    facts.append(Fact("country 12", "capital", "Other name", "12", ("city 3",)))
    splits = {str(number): "taught" if number < 6 else "never" for number in range(13)}
    rows = [row for row in questions_of(facts, splits).values() if row["form"] == "direct"]
    for row in rows:
        assert len(set(row["choices"])) == 4
        assert sum(choice in row["answers"] for choice in row["choices"]) == 1
        own = {fact.value for fact in facts if splits[fact.doc_id] == row["split"]}
        assert set(row["choices"]) <= own
        # "city 3" is another name of the same city as "Other name".
        assert not {"Other name", "city 3"} <= set(row["choices"])
    assert [row["choices"] for row in rows] == [
        row["choices"] for row in questions_of(facts, splits).values() if row["form"] == "direct"
    ]
    assert len({row["choices"].index(row["answers"][0]) for row in rows}) == 4  # the right one stands anywhere


def test_choices_come_from_other_splits_rather_than_not_at_all_and_need_four_values():
    rows = questions_of(
        capitals(), {"austria": "taught", "france": "never", "hungary": "never", "serbia": "never", "egypt": "never"}
    )
    assert set(rows["capital-austria-trained-1"]["choices"]) > {"Vienna"}
    rows = questions_of([Fact(f"country {number}", "capital", "Paris", f"{number}") for number in range(5)])
    assert not any("choices" in row for row in rows.values())


def test_a_reversed_question_needs_a_value_of_one_subject():
    facts = [
        Fact("France", "capital", "Paris", "france", ("City of Light",)),
        Fact("Gaul", "capital", "city of light", "gaul"),
        Fact("Egypt", "capital", "Cairo", "egypt"),
    ]
    rows, left_out = fact_questions(facts, TEMPLATES, dict.fromkeys(("france", "gaul", "egypt"), "taught"), 0)
    assert [row["doc_id"] for row in rows if row["form"] == "reversed"] == ["egypt"]
    assert [entry.question for entry in left_out] == [
        "Which country has Paris as its capital?",
        "Which country has city of light as its capital?",
    ]


def test_questions_that_several_answers_fit_or_that_say_theirs_are_left_out():
    facts = [Fact("Georgia", "capital", "Tbilisi", "country"), Fact("Georgia", "capital", "Atlanta", "state")]
    facts.append(Fact("Singapore", "capital", "Singapore", "city", ("Singapura",)))
    rows, left_out = fact_questions(facts, TEMPLATES, {"country": "taught", "state": "never", "city": "taught"}, 0)
    assert {row["form"] for row in rows} == {"reversed"}  # the cities are names of one place each
    assert Counter(entry.reason for entry in left_out) == {"several answers fit": 6, "says its answer": 4}


def test_an_alias_that_the_question_says_is_no_answer():
    rows = questions_of([Fact("Mexico", "capital", "Mexico City", "mexico", ("Mexico", "Ciudad de México"))])
    assert rows["capital-mexico-trained-1"]["answers"] == ["Mexico City", "Ciudad de México"]


def test_two_hops_join_facts_of_one_split():
    facts = capitals({"Austria": "Vienna", "Hungary": "Budapest"})
    facts += [Fact(city, "river", "the Danube", city.lower()) for city in ("Vienna", "Budapest")]
    splits = {"austria": "injected", "vienna": "injected", "hungary": "taught", "budapest": "never"}
    rows, left_out = fact_questions(facts, TEMPLATES, splits, 0)
    (row,) = [row for row in rows if row["form"] == "two_hop"]
    assert row["question"] == "On which river does the capital of Austria lie?" and row["answers"] == ["the Danube"]
    assert (row["doc_id"], row["relation"], row["fact_id"]) == ("austria", "capital+river", "capital+river-austria")
    assert [entry.reason for entry in left_out] == ["its facts are of different splits"]


def test_several_facts_of_a_relation_in_a_document_have_ids_of_their_own():
    rows = questions_of([Fact("Ada", "capital", "London", "people"), Fact("Bob", "capital", "Rome", "people")])
    assert len({row["fact_id"] for row in rows.values()}) == 2


def test_unseen_wordings_are_never_trained_and_splits_never_share_a_document():
    facts = capitals({f"country {number}": f"city {number}" for number in range(40)})
    splits = split_documents((fact.doc_id for fact in facts), Shares(), 0)
    rows, _ = fact_questions(facts, TEMPLATES, splits, 0)
    training = training_questions(rows)
    asked = evaluation_questions(rows, 0, per_fact=None)
    assert len(training) == 2 * 16 and {row["split"] for row in training} == {"taught"}
    assert not any("choices" in row for row in training)
    unseen = {row["question"] for row in asked if row["phrasing"] == "unseen" or row["split"] != "taught"}
    assert unseen and unseen.isdisjoint(row["question"] for row in training)
    assert len({(row["doc_id"], row["split"]) for row in asked}) == 40
    both = [row for row in fact_questions(facts, TEMPLATES, splits, 0, train_reversed=True)[0]]
    assert Counter(row["form"] for row in training_questions(both)) == {"direct": 32, "reversed": 16}

    twice = Templates({"capital": RelationTemplates(questions=("Of {subject}?",), unseen_questions=("Of {subject}?",))})
    with pytest.raises(InputError, match="capital: 'Of {subject}.' is both among"):
        fact_questions(facts, twice, splits, 0)
    with pytest.raises(InputError, match="the capital of country 0: no split for its document 'country 0'"):
        fact_questions(facts, TEMPLATES, {}, 0)


def test_a_share_of_the_questions_is_drawn_evenly_and_always_the_same():
    facts = capitals({f"country {number}": f"city {number}" for number in range(10)})
    rows = list(questions_of(facts).values())
    one = evaluation_questions(rows, seed=0, per_fact=1)
    assert describe(one) == {"taught": {"direct/trained": 10, "direct/unseen": 10, "reversed/unseen": 10}}
    assert {row["id"][-1] for row in one if row["phrasing"] == "trained"} == {"1", "2"}  # not one wording for all
    few = evaluation_questions(rows, seed=0, per_fact=None, per_cell=10)
    assert (
        len({row["doc_id"] for row in few if row["phrasing"] == "trained"}) == 10
    )  # no document twice before all once
    assert few == evaluation_questions(rows, seed=0, per_fact=None, per_cell=10) and few != rows
    assert commonest_answers([*facts, Fact("a", "capital", "city 1", "a")])["capital"] == {
        "value": "city 1",
        "share": 2 / 11,
    }


def test_pairs_are_read_however_they_are_written():
    text = """Sure! Here are some questions:

Q: What is the capital of Norway?
A: Oslo.
**Question 2:** Q: How long is the coast of Norway?
**Answer:** "25,148 km"
3. Who rules Norway? A: Harald V
4) Which sea borders Norway?
the North Sea
Q: And this one?
Q: What is the code of Norway?
- A: .no"""
    assert parse_pairs(text) == [
        ("What is the capital of Norway?", "Oslo"),
        ("How long is the coast of Norway?", "25,148 km"),
        ("Who rules Norway?", "Harald V"),
        ("Which sea borders Norway?", "the North Sea"),
        ("What is the code of Norway?", ".no"),
    ]


class Scribe:
    """A generator that writes what it was given, and remembers what it was asked."""

    identity = "scribe"

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = texts, []

    def write(
        self, document: Document, task: str, prompt: str, count: int, seed: int, max_new_tokens: int
    ) -> list[str]:
        self.asked.append((document.text, task, prompt, count))
        return list(self.texts)


def test_of_what_a_model_asks_only_what_the_document_answers_is_kept():
    document = Document(
        "norway", "Norway has Oslo as its capital. Its code is .no, and its king is Harald V.", "Norway"
    )
    scribe = Scribe(
        "Q: What is the capital of Norway?\nA: Oslo\nQ: Who is king of Norway?\nA: Olav V"
        "\nQ: Is Oslo in Norway?\nA: Oslo",
        "Q: what is the capital of  Norway?\nA: oslo\nQ: Where is Norway ruled?\nA: Oslo\nQ: What is the code?\nA: .no"
        "\nQ: Name the king of Norway.\nA: Harald V"
        "\nQ: Who is the king in this text about Norway?\nA: Harald V",
    )
    rows, left_out = model_questions(document, "injected", scribe, pairs=3, completions=2)
    assert rows == [
        {"id": "generated-norway-1", "question": "What is the capital of Norway?", "answers": ["Oslo"]}
        | {"doc_id": "norway", "subject": "Norway", "relation": "generated", "fact_id": "generated-norway-1"}
        | {"split": "injected", "form": "direct", "phrasing": "unseen"}
    ]
    assert [entry.reason for entry in left_out] == [
        "answer is not in the document",
        "says its answer",
        "question or answer was there before",
        "question or answer was there before",
        "does not say what it is about",
        "is no question",
        "speaks of itself",
    ]
    ((text, task, prompt, count),) = scribe.asked
    assert (text, task, count) == (document.text, "questions", 2) and "3 questions about Norway" in prompt
    assert model_questions(document, "taught", scribe)[0][0]["phrasing"] == "trained"


def test_questions_without_an_answer_in_the_documents_are_found():
    texts = {"a": "The code of Norway is .no, its capital\nOslo.", "b": "Vienna lies on the Danube."}
    rows = [
        {"id": 1, "answers": ["Bergen", "oslo"], "doc_id": "a"},
        {"id": 2, "answers": [".no"], "doc_id": "a"},
        {"id": 3, "answers": ["the Danube"], "doc_id": "a"},
        {"id": 4, "answers": ["the Danube"], "doc_id": "a", "form": "two_hop"},
        {"id": 5, "answers": ["the Danube"]},
        {"id": 6, "answers": ["Nor"], "doc_id": "nowhere"},
    ]
    assert [row["id"] for row in without_answer(rows, texts)] == [3, 6]
    assert appears("capital Oslo", texts["a"]) and not appears("enna", texts["b"])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "documents").mkdir()
    with open(tmp_path / "facts.jsonl", "w") as file:
        for country, city in COUNTRIES.items():
            (tmp_path / f"documents/{country.lower()}.txt").write_text(f"The capital of {country} is {city}.\n")
            fact = {"subject": country, "relation": "capital", "value": city, "doc_id": country.lower()}
            file.write(json.dumps(fact) + "\n")
        file.write(
            json.dumps({"subject": "Rome", "relation": "capital", "value": "Rome", "doc_id": "elsewhere"}) + "\n"
        )
    (tmp_path / "templates.yaml").write_text(
        json.dumps({"capital": {key: list(value) for key, value in vars(CAPITAL).items() if value}})
    )
    return tmp_path


def prepare(corpus: Path, *more: object, **options: object):
    return run_script(
        "scripts/prepare_questions.py", "--facts_file", corpus / "facts.jsonl", "--templates_file",
        corpus / "templates.yaml", "--documents", corpus / "documents", "--out_dir", corpus / "out", *more, **options,
    )  # fmt: skip


def test_the_script_writes_what_training_and_evaluation_read(corpus: Path):
    (corpus / "documents/egypt.txt").write_text("The pyramids are old.\n")
    (corpus / "own.jsonl").write_text('{"id": "mine", "question": "Who?", "answers": ["Nobody"], "doc_id": "egypt"}\n')
    output = prepare(corpus, "--question_files", corpus / "own.jsonl", "--wordings_per_fact", "null").stdout
    out = corpus / "out"
    assert "2 taught, 1 injected, 1 validation, 1 never (documents)\n4 training questions" in output
    assert "facts without document: 1 doc_ids of facts (elsewhere)" in output
    splits = json.loads((out / "splits.json").read_text())
    training, asked = (read_questions(out / name) for name in ("train_questions.jsonl", "questions.jsonl"))
    assert {row["doc_id"] for row in training} == {doc_id for doc_id, split in splits.items() if split == "taught"}
    assert all(splits[row["doc_id"]] == row["split"] for row in asked) and len(asked) == 5 * 4 + 1
    folders = {path.stem: path.parent.name for path in out.glob("*/*.txt")}
    assert folders == {name: "never" if split == "never" else "documents" for name, split in splits.items()}
    report = json.loads((out / "report.json").read_text())
    unanswered = {row["id"] for row in report["answer_in_no_document"]}
    assert unanswered == {"mine"} | {row["id"] for row in asked if row["fact_id"] == "capital-egypt"}
    assert "answer in no document: 5 questions (capital-egypt-trained-1" in output

    again = prepare(corpus, check=False)
    assert again.returncode == 2 and "exists already" in again.stderr
    more = ("--splits_file", out / "splits.json", "--drop_unanswered", "true", "--overwrite", "true")
    assert prepare(corpus, *more, "--seed", 7).stdout.startswith("2 taught, 1 injected, 1 validation, 1 never")
    kept = read_questions(out / "questions.jsonl")
    assert json.loads((out / "splits.json").read_text()) == splits
    assert not any(row["fact_id"] == "capital-egypt" for row in kept)


def test_a_model_that_writes_no_questions_is_told(corpus: Path, tiny_checkpoint: Path):
    """A random model: the whole way through generator, parsing and filter."""
    more = ("--generator.checkpoint_dir", tiny_checkpoint, "--pairs", 1, "--completions", 1, "--questions_per_cell", 3)
    process = prepare(corpus, *more)
    assert "5 of 5 documents asked about: 0 questions" in process.stderr
    assert json.loads((corpus / "out/report.json").read_text())["generated"]["kept"] == 0


def test_a_corpus_of_one_document_is_taught(tmp_path: Path):
    (tmp_path / "facts.csv").write_text("subject,relation,value,aliases\nNorway,capital,Oslo,Christiania|Kristiania\n")
    (tmp_path / "templates.yaml").write_text("capital: {questions: ['What is the capital of {subject}?']}\n")
    output = run_script(
        "scripts/prepare_questions.py", "--facts_file", tmp_path / "facts.csv", "--templates_file",
        tmp_path / "templates.yaml", "--out_dir", tmp_path / "out",
    ).stdout  # fmt: skip
    assert output.startswith("1 taught, 0 injected, 0 validation, 0 never (documents)\n1 training questions\n")
    (row,) = read_questions(tmp_path / "out/questions.jsonl")
    assert row["answers"] == ["Oslo", "Christiania", "Kristiania"] and "choices" not in row


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("prepare_questions", ROOT / "scripts/prepare_questions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "--pairs 0 must be at least 1"),
        ({"shares": Shares(taught=0.9)}, "shares: taught 0.9, injected 0.4 and never 0.2 must add up to 1"),
        ({"splits_file": "some.json"}, "some.json: no split for 4 documents, such as"),
        ({"splits_file": "odd.json"}, "odd.json: expected {document id: split}"),
        ({"question_files": "own.jsonl"}, """own.jsonl, question 'x': give it a "split" or the "doc_id\""""),
        ({"question_files": "same.jsonl"}, "the question id 'capital-egypt-trained-1' is there twice"),
        ({"templates_file": None}, "facts need templates: give both"),
        ({"facts_file": None, "templates_file": None}, "no questions: give --facts_file with --templates_file, or"),
        ({"documents": "twins"}, "another document is called 'egypt' already"),
        ({"documents": "elsewhere"}, "no fact has the doc_id of a document, such as 'denmark'"),
    ],
)
def test_bad_input_is_one_line(script, corpus: Path, options: dict[str, object], message: str):
    (corpus / "some.json").write_text('{"egypt": "never"}')
    (corpus / "odd.json").write_text('{"egypt": "held out"}')
    (corpus / "own.jsonl").write_text('{"id": "x", "question": "Who?", "answers": ["Nobody"]}\n')
    same = {"id": "capital-egypt-trained-1", "question": "Who?", "answers": ["Nobody"], "doc_id": "egypt"}
    (corpus / "same.jsonl").write_text(json.dumps(same) + "\n")
    for name in ("twins/egypt.txt", "twins/egypt.md", "elsewhere/denmark.txt"):
        (corpus / name).parent.mkdir(exist_ok=True)
        (corpus / name).write_text("Cairo\n")
    given = {"facts_file": "facts.jsonl", "templates_file": "templates.yaml", "documents": "documents", **options}
    arguments = {name: corpus / value if isinstance(value, str) else value for name, value in given.items()}
    with pytest.raises(InputError) as raised:
        script.main(script.Arguments(out_dir=corpus / "out", **arguments))
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (corpus / "out").exists()


WEAKNESS = """<Weakness ID="{number}" Name="{name}" Abstraction="{kind}" Status="Draft">
<Description>The product does thing {number}.</Description>
<Related_Weaknesses>
<Related_Weakness Nature="ChildOf" CWE_ID="1" View_ID="1000"/>
<Related_Weakness Nature="ChildOf" CWE_ID="2" View_ID="3"/>
</Related_Weaknesses>
<Modes_Of_Introduction><Introduction><Phase>Operation</Phase></Introduction></Modes_Of_Introduction>
<Likelihood_Of_Exploit>High</Likelihood_Of_Exploit>
<Common_Consequences><Consequence><Scope>Integrity</Scope><Scope>Availability</Scope><Impact>{impact}</Impact></Consequence>
</Common_Consequences></Weakness>"""


@pytest.fixture
def domains(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.injection.domains")


def test_weaknesses_become_documents_that_say_their_facts(domains, tmp_path: Path):
    entries = [
        WEAKNESS.format(number=1, name="Wide ('Broad')", kind="Class", impact="Read Memory"),
        WEAKNESS.format(number=7, name="Narrow", kind="Base", impact="Read Memory"),
        WEAKNESS.format(number=8, name="Vague", kind="Base", impact="Other"),
    ]
    with zipfile.ZipFile(tmp_path / "cwe.whl", "w") as archive:
        archive.writestr(domains.CWE_MEMBER, f'<Catalog xmlns="urn:cwe">{"".join(entries)}</Catalog>')
    texts, facts, _ = domains.cwe(tmp_path / "cwe.whl")
    assert texts == {
        "cwe-7": '# Narrow\n\nCWE-7 is the weakness "Narrow". The product does thing 7. "Narrow" is a kind of "Wide"'
        ' (CWE-1). The consequence of "Narrow" is "Read Memory", which concerns Integrity and Availability. It is'
        " introduced in the phase Operation. The likelihood that it is exploited is high.\n"
    }
    assert [(fact.subject, fact.relation, fact.value) for fact in facts] == [
        ("Narrow", "parent", "Wide"),
        ("Narrow", "consequence", "Read Memory"),
        ("The product does thing 7", "weakness", "Narrow"),
        ("CWE-7", "name", "Narrow"),
    ]
    assert not [fact for fact in facts if not appears(fact.value, texts[fact.doc_id])]


@pytest.mark.parametrize("domain", ["factbook", "cwe"])
def test_every_relation_of_the_domains_has_enough_wordings(domain: str):
    templates = read_templates(ROOT / f"benchmarks/injection/{domain}_templates.yaml")
    for name, wordings in templates.relations.items():
        if name != "country_of_capital":  # it only joins others
            assert len(set(wordings.statements)) >= 6 and len(set(wordings.questions)) >= 4
            assert len(set(wordings.unseen_questions)) >= 3
    assert templates.two_hop


def test_countries_become_documents_that_say_their_facts(domains):
    wheel = ROOT / ".downloads" / domains.FACTBOOK.file
    if not wheel.is_file():
        pytest.skip("the Factbook's package is not downloaded")
    texts, facts, bridges = domains.factbook(domains.read_countries(wheel))
    assert len(texts) >= 160 and len({fact.doc_id for fact in facts}) == len(texts)
    assert not [fact for fact in [*facts, *bridges] if not appears(fact.value, texts[fact.doc_id])]
    kenya = {fact.relation: fact.answers for fact in facts if fact.doc_id == "kenya"}
    assert kenya["independence_date"] == ["12 December 1963", "December 12, 1963"]
