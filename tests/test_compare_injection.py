"""Comparing recipes: which runs there are, resuming and failing, what the numbers allow to say, and the report."""

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, run_script

from lit_llama.errors import InputError
from lit_llama.experiment_runs import Run, Scripts, devices_of, directory, is_finished
from lit_llama.injection.comparison import (
    Experiment,
    carry_out,
    check,
    check_keys,
    controls,
    first_wave,
    recipes,
)
from lit_llama.injection.comparison_charts import Series, scatter, ticks
from lit_llama.injection.comparison_report import write_report
from lit_llama.injection.comparison_results import collect, summarise, verdict

# What stands in for training and evaluation: it answers a share of the questions that its recipe and options decide.
TRAIN = """
import json, sys, time
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = Path(given["--out_dir"])
with open(out.parent.parent / "calls.txt", "a") as file:
    file.write(out.parent.name + (" resumed" if "--resume" in given else "") + "\\n")
(out / "state").mkdir(parents=True, exist_ok=True)
(out / "state" / "state.json").write_text("{}")
if given["--recipe"] == "broken":
    print("error: no headings in the documents", file=sys.stderr)
    sys.exit(2)
if given["--recipe"] == "slow" and "--resume" not in given:
    (out / "started").touch()
    time.sleep(60)
(out / "metrics.csv").write_text("step,val_loss,general_loss\\n0,3.0,3.1\\n10,2.0,3.2\\n20,1.5,3.3\\n")
report = {"trainable_parameters": 1000, "tokens": int(given["--tokens"]), "seconds": 12.5, "peak_memory_gb": 0.5}
(out / "report.json").write_text(json.dumps(report))
Path(str(out) + "-examples").mkdir(exist_ok=True)
Path(str(out) + "-examples", "examples.jsonl").write_text('{"doc_id": "a"}\\n{"doc_id": "b", "reason": "too short"}\\n')
"""
EVALUATE = """
import json, sys
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name = Path(given["--out"]).parent.name
rights = {"raw": 0.2, "qa-only": 0.1, "permute": 0.8, "views": 0.5, "slow": 0.5, "base": 0.0}[name.split(".")[0]]
if "learning_rate=0.1" in name:
    rights /= 2
rows = [json.loads(line) for line in open(given["--question_file"])]
for number, row in enumerate(rows):
    right = float(number // 2 % 20 < 20 * rights)
    row |= {"answer": row["answers"][0] if right else "<b>wrong</b>", "exact_match": right, "contains": right}
cells = {}
for row in rows:
    cells.setdefault(row["split"], {}).setdefault(row["form"] + "/" + row["phrasing"], []).append(row["exact_match"])
means = lambda v: {"count": len(v), "exact_match": sum(v) / len(v), "contains": sum(v) / len(v)}
cells = {s: {c: means(v) for c, v in d.items()} for s, d in cells.items()}
bits = 1.0 if name.startswith("base") else 1.25 if name.startswith("raw") else 1.01
texts = {"general": {"bits_per_byte": bits}}
result = {"rows": rows, "cells": cells, "texts": texts, "kl_to_base": None, "recall": {}, "answer_entropy": {}}
Path(given["--out"]).write_text(json.dumps(result))
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    paths = Scripts(tmp_path / "train.py", tmp_path / "evaluate.py")
    paths.train.write_text(TRAIN)
    paths.evaluate.write_text(EVALUATE)
    return paths


def write_questions(path: Path, documents: int = 40) -> None:
    rows = []
    for split in ("injected", "validation", "never", "known"):
        for number in range(documents):
            for phrasing in ("trained", "unseen"):
                doc_id = f"{split}-{number:02d}"
                row = {"id": f"{doc_id}-{phrasing}", "question": f"What of {doc_id}?", "answers": ["this"]}
                row |= {"doc_id": doc_id, "split": split, "form": "direct", "phrasing": phrasing, "relation": "of"}
                rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def experiment_in(folder: Path, **changes: object) -> Experiment:
    for name in ("base", "documents", "store"):
        (folder / name).mkdir(exist_ok=True)
    write_questions(folder / "questions.jsonl")
    (folder / "train.jsonl").touch()
    values = {
        "checkpoint_dir": folder / "base",
        "documents": folder / "documents",
        "question_file": folder / "questions.jsonl",
        "train_questions": folder / "train.jsonl",
        "out_dir": folder / "out",
        "recipes": ["permute"],
        "tokens": 1000,
        "seeds": [0, 1],
        "data_dirs": {"general": folder / "store"},
        "devices": ["cpu", "cpu"],
    }
    return Experiment(**{**values, **changes})


def names(runs: list[Run]) -> list[str]:
    return [run.name for run in runs]


def calls(experiment: Experiment) -> list[str]:
    return sorted((experiment.out_dir / "runs" / "calls.txt").read_text().splitlines())


# --- planning


def test_controls_are_added_and_named_ones_kept(tmp_path: Path) -> None:
    entries = recipes(experiment_in(tmp_path, recipes=["permute", {"name": "raw", "options": {"raw.chunk": 3}}]))
    assert [(entry.label, entry.options) for entry in entries] == [
        ("qa-only", {}), ("permute", {}), ("raw", {"raw.chunk": 3}),
    ]  # fmt: skip
    assert [entry.label for entry in recipes(experiment_in(tmp_path, train_questions=None))] == ["raw", "permute"]


def test_arguments_of_a_run(tmp_path: Path) -> None:
    entry = {"name": "permute", "label": "permute 5", "options": {"permute.views": 5}}
    learners = {"full": {"train.learning_rate": 2e-5}, "small": {"learner": "lora", "lora.targets": [["q_proj"]]}}
    experiment = experiment_in(tmp_path, recipes=[entry], learners=learners, seeds=[3], training_options={"seed": 0})
    sweeps = first_wave(experiment)
    full, small = (sweeps["permute 5", learner][0] for learner in ("full", "small"))
    assert full.name == "permute_5.full.seed3" and small.options == {"lora.targets": ["q_proj"]}
    given = dict(zip(full.training[::2], full.training[1::2], strict=True))
    expected = {"--recipe": "permute", "--learner": "full", "--recipes.permute.views": "5", "--tokens": "1000"}
    expected |= {"--train.learning_rate": "2e-05", "--train.seed": "3", "--seed": "0"}
    assert expected.items() <= given.items()
    asked = dict(zip(*[iter(full.evaluations["evaluation.json"])] * 2, strict=True))
    assert asked["--checkpoint_dir"] == given["--out_dir"] + "/checkpoint"
    assert asked["--base_dir"] == str(tmp_path / "base") and "--adapter_dir" not in asked
    assert "--lora.targets" in small.training and '["q_proj"]' in small.training
    contexts = [run.evaluations["evaluation.json"] for run in controls(experiment)]
    assert [arguments[arguments.index("--context") + 1] for arguments in contexts] == ["none", "oracle", "bm25"]


def test_runs_go_to_every_card_or_twice_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_of(experiment_in(tmp_path, devices=["cuda:1"])) == ["cuda:1"]
    experiment = experiment_in(tmp_path, devices=["auto"])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert devices_of(experiment) == ["cuda:0", "cuda:1"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert devices_of(experiment) == ["cpu", "cpu"]
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert devices_of(experiment) == ["auto"]


@pytest.mark.parametrize("by", [None, "permute"])
def test_options_are_chosen_on_validation_at_the_first_seed(tmp_path: Path, scripts: Scripts, by: str | None) -> None:
    learners = {"lora": {"train.learning_rate": [0.1, 0.2]}}
    experiment = experiment_in(tmp_path, learners=learners, selection_recipe=by)
    runs = [run for run in carry_out(experiment, scripts) if run.learner]
    assert {run.options["train.learning_rate"] for run in runs} == {0.2}
    trained = calls(experiment)
    assert len(trained) == (9 if by is None else 7)  # both rates at seed 0 of all recipes, or of one
    assert sum("learning_rate=0.1" in name for name in trained) == (3 if by is None else 1)
    assert not any("learning_rate=0.1.seed1" in name for name in trained)


def test_only_the_best_and_the_controls_get_further_seeds(tmp_path: Path, scripts: Scripts) -> None:
    learners = {"lora": {}, "full": {"recipes": ["raw", "views"], "train.learning_rate": [0.1, 0.2]}}
    experiment = experiment_in(tmp_path, recipes=["views", "permute"], learners=learners, best=1)
    runs = [run for run in carry_out(experiment, scripts) if run.learner]
    assert sorted(names(runs)) == [
        *(f"permute.lora.seed{seed}" for seed in (0, 1)),
        *(f"qa-only.lora.seed{seed}" for seed in (0, 1)),
        *(f"raw.full.learning_rate=0.2.seed{seed}" for seed in (0, 1)),
        *(f"raw.lora.seed{seed}" for seed in (0, 1)),
        *(f"views.full.learning_rate=0.2.seed{seed}" for seed in (0, 1)),
        "views.lora.seed0",
    ]
    results = summarise(experiment, collect(experiment, runs))
    assert [(arm.recipe, len(arm.finished)) for arm in results.arms][-1] == ("views", 1)  # though raw answers less


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "has one twice"),
        ({"best": 0}, "best must be positive"),
        ({"learners": {"lora": {"recipes": ["pit"]}}}, "learners, lora: recipe 'pit' is none of raw, qa-only, permute"),
        ({"recipes": ["permute", "permute"]}, "'permute' is there twice"),
        ({"recipes": [{"name": "permute", "option": {}}]}, "'option' is no key here; did you mean 'options'"),
        ({"selection_recipe": "pit"}, "'pit' is none of raw, qa-only, permute"),
        ({"learners": {"quick": {}}}, "needs \"learner: lora\""),
        ({"learners": {"lora": {"lora.r": []}}}, "an empty list"),
        ({"cell": "reversed/unseen"}, "(there: direct/trained, direct/unseen)"),
        ({"documents": Path("nowhere")}, "documents: nowhere does not exist"),
        ({"data_dirs": {"general": Path("nowhere")}}, "data_dirs, general: nowhere"),
        ({"tokens": 0}, "tokens must be positive"),
    ],
)  # fmt: skip
def test_wrong_experiments_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError) as raised:
        check(experiment_in(tmp_path, **changes))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_choosing_needs_validation_questions(tmp_path: Path) -> None:
    experiment = experiment_in(tmp_path, learners={"lora": {"lora.r": [4, 8]}})
    kept = [line for line in experiment.question_file.read_text().splitlines() if "validation" not in line]
    experiment.question_file.write_text("\n".join(kept))
    with pytest.raises(InputError, match='no question of split "validation"'):
        check(experiment)


def test_unknown_keys_name_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text("checkpoint_dir: a\nsedes: [1]\n")
    with pytest.raises(InputError, match="'sedes' is no key here; did you mean 'seeds'"):
        check_keys(path)
    finished = run_script("scripts/compare_injection.py", "--config", path, check=False)
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr == f"error: {path}: 'sedes' is no key here; did you mean 'seeds'?\n"


# --- carrying out


def test_finished_runs_are_not_repeated_and_changed_ones_refused(tmp_path: Path, scripts: Scripts) -> None:
    experiment = experiment_in(tmp_path)
    runs = carry_out(experiment, scripts)
    assert all(is_finished(experiment, run) for run in runs) and len(runs) == 3 + 3 * 2
    trained = calls(experiment)
    carry_out(experiment, scripts)
    assert calls(experiment) == trained
    (directory(experiment, runs[-1]) / "evaluation.json").unlink()
    carry_out(experiment, scripts)  # evaluates again, trains no more
    assert calls(experiment) == trained and is_finished(experiment, runs[-1])

    changed = experiment_in(tmp_path, tokens=2000)
    with pytest.raises(InputError, match=r"other arguments \(2000\): choose another out_dir, or pass --overwrite true"):
        carry_out(changed, scripts)
    changed.overwrite = True
    again = carry_out(changed, scripts)
    assert len(calls(experiment)) == 2 * len(trained)
    assert json.loads((directory(changed, again[-1]) / "trained" / "report.json").read_text())["tokens"] == 2000


def test_a_failing_run_leaves_the_others(tmp_path: Path, scripts: Scripts) -> None:
    experiment = experiment_in(tmp_path, recipes=["broken", "permute"])
    rows = collect(experiment, carry_out(experiment, scripts))
    failed = {row["run"]: row["error"] for row in rows if row["status"] != "finished"}
    assert failed == {f"broken.lora.seed{seed}": "no headings in the documents" for seed in (0, 1)}
    assert sum(row["status"] == "finished" for row in rows) == 3 + 3 * 2
    results = summarise(experiment, rows)
    write_report(results, "the command")
    for name in ("report.md", "report.html"):
        text = (experiment.out_dir / name).read_text()
        assert "no headings in the documents" in text and "Runs that did not finish" in text
    assert any("2 runs did not finish" in sentence for sentence in verdict(results))


def test_costs_and_cells_are_in_the_results(tmp_path: Path, scripts: Scripts) -> None:
    experiment = experiment_in(tmp_path, keep_only_adapters=True)
    collect(experiment, carry_out(experiment, scripts))
    rows = [json.loads(line) for line in (experiment.out_dir / "results.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["run"] == "permute.lora.seed1")
    costs = {"trainable_parameters": 1000, "tokens": 1000, "seconds": 12.5, "peak_memory_gb": 0.5, "examples": 1}
    assert row["costs"] == costs and row["cells"]["injected"]["direct/unseen"]["count"] == 40
    trained = experiment.out_dir / "runs" / "permute.lora.seed1" / "trained"
    assert (trained / "report.json").is_file() and not (trained / "state").exists()


def test_an_interruption_ends_the_children_and_is_resumed(tmp_path: Path, scripts: Scripts) -> None:
    program = tmp_path / "drive.py"
    program.write_text(
        "import sys\nfrom pathlib import Path\nfrom lit_llama.injection.comparison import *\n"
        "folder = Path(sys.argv[1])\n"
        "carry_out(Experiment(checkpoint_dir=folder / 'base', documents=folder / 'documents', out_dir=folder / 'out',\n"
        "    question_file=folder / 'questions.jsonl', recipes=['slow'], tokens=10, seeds=[0]),\n"
        "    Scripts(folder / 'train.py', folder / 'evaluate.py'))\n"
    )
    experiment_in(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, program, tmp_path], env=environment, stderr=subprocess.PIPE, text=True)
    slow, other = (tmp_path / "out" / "runs" / f"{name}.lora.seed0" for name in ("slow", "raw"))
    deadline = time.monotonic() + 60
    while not ((slow / "trained" / "started").exists() and (other / "evaluation.json").exists()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) != 0
    process.stderr.close()
    running = subprocess.run(["ps", "-A", "-o", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path / "train.py") not in running and not (slow / "evaluation.json").exists()
    assert (other / "evaluation.json").exists()
    subprocess.run([sys.executable, program, tmp_path], env=environment, check=True, capture_output=True)
    assert (slow / "evaluation.json").exists()
    assert (slow.parent / "calls.txt").read_text().splitlines()[-1] == "slow.lora.seed0 resumed"


# --- what the numbers say


def fabricated(tmp_path: Path, effects: dict[str, float], seeds: int = 3, documents: int = 60, questions: int = 2):
    """Results of arms whose questions are right with known rates, beside a base that knows nothing."""
    random = np.random.default_rng(0)
    experiment = experiment_in(tmp_path, seeds=list(range(seeds)))
    rows = []
    for recipe, rate in effects.items():
        for seed in range(seeds if recipe != "base" else 1):
            answers = [
                {"id": f"{d}-{q}", "doc_id": str(d), "split": "injected", "form": "direct", "phrasing": "unseen",
                 "question": "?", "answers": ["a"], "answer": "a", "exact_match": right, "contains": right}
                for d in range(documents) for q in range(questions) for right in [float(random.random() < rate)]
            ]  # fmt: skip
            path = tmp_path / f"{recipe}{seed}.json"
            path.write_text(json.dumps({"rows": answers}))
            cells = {"injected": {"direct/unseen": {"count": len(answers), "exact_match": rate}}}
            texts = {"general": {"bits_per_byte": 1.0 if recipe == "base" else 1.2}}
            row = {"run": f"{recipe}{seed}", "recipe": recipe, "learner": "lora", "seed": seed, "options": {}}
            row |= {"status": "finished", "cells": cells, "texts": texts, "evaluation": str(path), "costs": {}}
            rows.append(row | ({"learner": None, "seed": None} if recipe == "base" else {}))
    return summarise(experiment, rows)


def test_a_known_effect_is_found_and_its_absence_too(tmp_path: Path) -> None:
    results = fabricated(tmp_path, {"base": 0.0, "raw": 0.2, "permute": 0.5, "views": 0.21, "worse": 0.02})
    arms = {arm.recipe: arm for arm in results.arms}
    assert results.winner is arms["permute"] and arms["permute"].mark == "better" and arms["worse"].mark == "worse"
    assert arms["permute"].gain.low < 0.3 < arms["permute"].gain.high
    assert arms["views"].mark == "" and arms["raw"].gain is None
    # Holm by hand: of three p-values the smallest is tripled, and none falls below one before it.
    raw_p = sorted(arms[name].gain.p for name in ("permute", "worse", "views"))
    corrected = [3 * raw_p[0], max(3 * raw_p[0], 2 * raw_p[1]), max(2 * raw_p[1], raw_p[2])]
    assert sorted(arms[name].p for name in ("permute", "worse", "views")) == pytest.approx(corrected)
    said = verdict(results)
    assert said[0].startswith("permute with lora wins") and "much was forgotten" in " ".join(said)
    # The interval of the base, which knows nothing, is Wilson's over 60 documents, not empty: z² / (n + z²).
    assert results.base.headline.high == pytest.approx(3.8415 / (60 + 3.8415), abs=1e-4)


def test_a_difference_within_the_noise_is_inconclusive(tmp_path: Path) -> None:
    results = fabricated(tmp_path, {"base": 0.0, "raw": 0.3, "permute": 0.38}, seeds=1, documents=30, questions=1)
    said = verdict(results)
    assert said[0].startswith(("INCONCLUSIVE", "No recipe")) and any("first look" in sentence for sentence in said)


def test_close_winners_are_not_told_apart(tmp_path: Path) -> None:
    results = fabricated(tmp_path, {"base": 0.0, "raw": 0.1, "permute": 0.5, "views": 0.49})
    assert any(sentence.startswith("INCONCLUSIVE which of the best") for sentence in verdict(results))


# --- the report


class Page(HTMLParser):
    """Checks that tags are closed in order, and gathers what the page would load."""

    void = {"meta", "br", "wbr", "line", "circle", "rect"}

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.loaded, self.ids, self.labels = [], [], [], [], []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.loaded.append(value)
            if name == "id":
                self.ids.append(value)
            if name == "aria-labelledby":
                self.labels += value.split()
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_complete_by_itself(tmp_path: Path, scripts: Scripts) -> None:
    learners = {"lora": {"train.learning_rate": [0.1, 0.2]}, "full": {}}
    experiment = experiment_in(tmp_path, learners=learners)
    results = summarise(experiment, collect(experiment, carry_out(experiment, scripts)))
    write_report(results, "python compare <me> & more")
    text = (experiment.out_dir / "report.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == [] and page.loaded == [] and "script" not in page.tags
    assert not any(word in text for word in ("http:", "https:", "url(", "@import"))
    assert page.tags.count("svg") == page.tags.count("desc") == 1 + 2 + 2 + 2 * 2  # no probes: two curves a learner
    assert len(page.ids) == len(set(page.ids)) and set(page.labels) == set(page.ids)
    assert (
        "&lt;b&gt;wrong&lt;/b&gt;" in text and "<b>wrong" not in text and "python compare &lt;me&gt; &amp; more" in text
    )
    assert "permute with lora" in text or "permute with full" in text
    markdown = (experiment.out_dir / "report.md").read_text()
    for said in ("## Verdict", "## All recipes", "## Controls", "base, BM25 retrieval", "## Answers", "▲", "0.2"):
        assert said in markdown
    assert "validation" not in markdown


def test_labels_of_a_chart_do_not_overlap() -> None:
    random = np.random.default_rng(0)
    series = [Series(f"recipe{number}+qa+replay", number, random.normal(0.3, 0.03, (3, 2))) for number in range(8)]
    points = [point for one in series for point in one.points]
    svg = scatter("t", series, "x", "y", str, str, *zip(*points, strict=True))
    boxes = []
    for part in svg.split("<text ")[1:]:
        if 'class="label' in part:
            x, y = (float(part.split(f'{axis}="')[1].split('"')[0]) for axis in "xy")
            boxes.append((x, y, x + 7 * len(part.split(">")[1].split("<")[0]), y + 12))
    assert len(boxes) == 8
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert right < 445 and not any(
            left < b[2] and b[0] < right and top < b[3] and b[1] < bottom for b in boxes[number + 1 :]
        )


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-0.013, 0.21, 5) == [0, 0.05, 0.1, 0.15, 0.2]
    assert ticks(97, 1003, 5) == [200, 400, 600, 800, 1000]
    series = [Series("a", 0, [(2.8, 0.1)]), Series("b", 1, [(2.9, 0.2)])]
    chart = scatter(
        "Cost", series, "minutes", "answers", "{:.3g}".format, "{:.0%}".format, [2.8, 2.9], [0.1, 0.2], True
    )
    assert ">2.5<" in chart and ">3<" in chart  # though a logarithmic axis has no 1, 2 or 5 there


# --- the real programs


def test_the_script_compares_on_a_tiny_model(tmp_path: Path, tiny_checkpoint: Path) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    rows = []
    for number in range(4):
        text = f"Country {number} lies in the north. The capital of Country {number} is Town{number}. " * 3
        (documents / f"country{number}.txt").write_text(text)
        question = {"question": f"What is the capital of Country {number}?", "answers": [f"Town{number}"]}
        question |= {"doc_id": f"country{number}", "split": "injected", "form": "direct", "relation": "capital"}
        question |= {"subject": f"Country {number}", "fact_id": f"capital-country{number}"}
        for phrasing in ("trained", "unseen"):
            rows.append({"id": f"{number}-{phrasing}", **question, "phrasing": phrasing})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "checkpoint_dir": str(tiny_checkpoint),
        "documents": str(documents),
        "question_file": str(tmp_path / "questions.jsonl"),
        "out_dir": str(tmp_path / "out"),
        "recipes": ["raw"],
        "learners": {"lora": {"learner": "lora", "lora.r": 2, "train.learning_rate": 1e-3}},
        "seeds": [0],
        "tokens": 256,
        "training_options": {"train.sequence_length": 64, "eval.interval": 1},
        "evaluation_options": {"sequence_length": 64, "passage_words": 20},
        "devices": ["cpu"],
        "threads": 1,
    }
    config = tmp_path / "experiment.yaml"
    config.write_text(yaml.safe_dump(settings))
    finished = run_script("scripts/compare_injection.py", "--config", config)
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["status"] for row in results] == ["finished"] * 4, finished.stderr
    assert results[3]["run"] == "raw.lora.seed0" and results[3]["costs"]["tokens"] > 0
    assert "first look" in finished.stdout and (tmp_path / "out" / "report.html").stat().st_size > 10_000
