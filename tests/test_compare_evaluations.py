"""scripts/compare_evaluations.py: the table, the verdict, and what it refuses."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, run_script

REPORT = {
    "trainable_parameters": 4_884_480,
    "total_parameters": 134_515_008,
    "tokens": 135_000,
    "seconds": 201.5,
    "tokens_per_second": 800.0,
    "peak_memory_gb": 2.34,
}


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", ROOT / "scripts/compare_evaluations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluation(domain: float, general: float, correct: dict[str, list[int]]) -> dict:
    """An evaluation in the format of scripts/evaluate.py; `correct` lists 0 or 1 for each question of a field."""
    rows = [
        {
            "id": f"{field}-{number}",
            "field": field,
            "split": "trained" if number else "heldout",
            "contains": float(right),
            "rouge_l": right / 2,
        }
        for field, rights in correct.items()
        for number, right in enumerate(rights)
    ]

    def scores(rows: list[dict]) -> dict[str, float]:
        rate = sum(row["contains"] for row in rows) / len(rows)
        return {"count": len(rows), "exact_match": rate / 2, "f1": rate / 2, "contains": rate, "rouge_l": rate / 2}

    def by(key: str) -> dict[str, dict]:
        return {name: scores([row for row in rows if row[key] == name]) for name in {row[key]: 0 for row in rows}}

    questions = {**scores(rows), "by_field": by("field"), "by_split": by("split"), "rows": rows}
    texts = {"domain": domain, "general": general}
    return {"perplexity": {name: {"perplexity": value} for name, value in texts.items()}, "questions": questions}


def write(directory: Path, before: dict, after: dict, report: dict = REPORT) -> list[object]:
    options = {"base": before, "adapter": after, "report": report}
    for name, value in options.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return [part for name in options for part in (f"--{name}", directory / f"{name}.json")]


def test_table_cost_and_verdict(tmp_path: Path):
    before = evaluation(15.0, 20.0, {"capital": [1, 1, 0, 0], "highest_point": [0] * 8})
    after = evaluation(10.5, 20.2, {"capital": [1, 1, 1, 0], "highest_point": [0] * 8})
    output = run_script("scripts/compare_evaluations.py", *write(tmp_path, before, after)).stdout
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]]
        for line in output.splitlines()
        if line.startswith("|")
    }
    assert cells["perplexity, held-out domain"] == ["15.00", "10.50", "-30.0%"]
    assert cells["perplexity, general text"] == ["20.00", "20.20", "+1.0%"]
    assert cells["closed-book answers, answer named"] == ["16.7%", "25.0%", "+8.3 points"]
    assert cells["closed-book answers, exact match"] == ["8.3%", "12.5%", "+4.2 points"]
    assert cells["closed-book answers, ROUGE-L"] == ["8.3%", "12.5%", "+4.2 points"]
    assert cells["– capital"] == ["2 of 4", "3 of 4", "+1"]
    assert cells["– highest point"] == ["0 of 8", "0 of 8", "+0"]
    assert cells["– about heldout documents"] == ["1 of 2", "1 of 2", "+0"]
    assert cells["– about trained documents"] == ["1 of 10", "2 of 10", "+1"]
    assert len({len(line) for line in output.splitlines() if line.startswith("|")}) == 1
    assert (
        "Trained 4,884,480 parameters (3.6% of the model) on 135,000 tokens in 202 s (800 tokens/s), 2.3 GB at peak."
        in output
    )
    assert output.splitlines()[-1] == (
        "Verdict: held-out domain text became 30% easier to predict; answers went from 2 to 3 of 12,"
        " no change beyond chance (p = 1), so that most stay unknown:"
        " reading alone teaches the text, and few facts that a question can reach;"
        " by ROUGE-L 1 came closer to the expected answer and 0 moved away, no change beyond chance (p = 1);"
        " general text became 1% harder to predict: nothing was forgotten."
    )


@pytest.mark.parametrize(
    ("rights", "general", "phrases"),
    [
        ([1] * 10, 30.0, ["from 0 to 10 of 10, a real gain (p = 0.002)", "50% harder to predict: much was forgotten"]),
        (
            [0] * 10,
            21.0,
            ["from 0 to 0 of 10, no change beyond chance (p = 1)", "5% harder to predict: a little was forgotten"],
        ),
    ],
)
def test_verdict_follows_the_numbers(
    compare: ModuleType, tmp_path: Path, rights: list[int], general: float, phrases: list[str]
):
    write(tmp_path, evaluation(10.0, 20.0, {"a": [0] * 10}), evaluation(11.0, general, {"a": rights}))
    before, after = (compare.Evaluation.read(tmp_path / f"{name}.json") for name in ("base", "adapter"))
    text = compare.verdict(before, after, "general")
    assert "domain text became 10% harder to predict" in text
    for phrase in phrases:
        assert phrase in text
    assert ("most stay unknown" in text) == (sum(rights) < 5)


# Figures of the binomial distribution: 2 * P(X <= 1 | n = 10, 1/2) and 2 * P(X <= 5 | n = 20, 1/2).
@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(9, 1, 0.021484375), (1, 9, 0.021484375), (15, 5, 0.04138946533203125), (0, 0, 1.0), (4, 4, 1.0)],
)
def test_sign_test(compare: ModuleType, gained: int, lost: int, p: float):
    assert compare.sign_test(gained, lost) == pytest.approx(p, rel=1e-12)


def test_rouge_l_is_compared_where_no_answer_is_whole(compare: ModuleType, tmp_path: Path):
    before, after = (evaluation(10.0, 20.0, {"a": [0] * 10}) for _ in range(2))
    for number, row in enumerate(after["questions"]["rows"]):
        row["rouge_l"] = 0.3 if number else -0.1
    write(tmp_path, before, after)
    before, after = (compare.Evaluation.read(tmp_path / f"{name}.json") for name in ("base", "adapter"))
    expected = "by ROUGE-L 9 came closer to the expected answer and 1 moved away, a real gain (p = 0.021)"
    assert expected in compare.verdict(before, after, "general")


def test_the_same_evaluation_twice(compare: ModuleType, tmp_path: Path):
    write(tmp_path, BASE, BASE)
    before, after = (compare.Evaluation.read(tmp_path / f"{name}.json") for name in ("base", "adapter"))
    text = compare.verdict(before, after, "general")
    assert text.count("neither easier nor harder to predict") == 2 and "from 1 to 1 of 2, no change" in text


def test_without_questions_and_report(tmp_path: Path):
    texts = [{"perplexity": {"domain": {"perplexity": value}}} for value in (4.0, 3.0)]
    arguments = write(tmp_path, *texts)[:4]
    output = run_script("scripts/compare_evaluations.py", *arguments).stdout
    assert "closed-book" not in output and "Trained" not in output
    assert output.endswith("Verdict: held-out domain text became 25% easier to predict.\n")


BASE = evaluation(15.0, 20.0, {"capital": [1, 0]})


@pytest.mark.parametrize(
    ("before", "after", "report", "message"),
    [
        (BASE, evaluation(15.0, 20.0, {"capital": [1, 0, 0]}), REPORT, "asked different questions (1 are in one only)"),
        (BASE, {**BASE, "perplexity": {}}, REPORT, "measured different texts (domain, general; none)"),
        ({"questions": {"count": 3}}, BASE, REPORT, "base.json: not an evaluation of scripts/evaluate.py"),
        ({}, BASE, REPORT, "base.json: neither a perplexity nor questions in it"),
        (BASE, BASE, {"tokens": 3}, "report.json: no number 'trainable_parameters'"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, before: dict, after: dict, report: dict, message: str):
    process = run_script("scripts/compare_evaluations.py", *write(tmp_path, before, after, report), check=False)
    assert process.returncode == 2
    assert message in process.stderr and len(process.stderr.splitlines()) == 1
