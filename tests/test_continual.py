"""Learning task after task: figures by hand, O-LoRA by its formula, what strategies forget on a toy, resuming."""

import io
import json
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run_script, write_tiny_tokenizer
from safetensors.torch import load_file

from lit_llama.checkpoint import load_model
from lit_llama.continual import Orthogonality, carry_out, write_generated
from lit_llama.continual_experiment import (
    ContinualExperiment,
    check,
    mixed,
    planned_runs,
    prepare,
    tasks_of,
    train_windows,
)
from lit_llama.continual_report import (
    average,
    backward,
    backward_transfer,
    collect,
    compared,
    forgetting,
    forward_transfer,
    just_learned,
    matrix,
    write_report,
)
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore
from lit_llama.errors import InputError
from lit_llama.evaluation.statistics import paired_difference
from lit_llama.experiment_runs import directory
from lit_llama.lora import LoRAConfig, inject_lora, load_adapter, lora_layers
from lit_llama.run_files import plain_arguments
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import EvalConfig, TrainConfig

NAMES = ("colours", "shapes", "tools")
QUESTIONS = {"colours": ("abcdef", "xyz"), "shapes": ("ghijkl", "pqr"), "tools": ("mnoABC", "uvw")}
RANK = 4


@pytest.fixture(scope="module")
def toy_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that an adapter can teach in a second: larger weights, and a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("toy-llama")
    write_tiny_tokenizer(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=128,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    return directory


def write_tasks(folder: Path) -> list[dict]:
    """Three tasks of six questions, no two tasks with a letter in common."""
    tasks = []
    for name, (asked, said) in QUESTIONS.items():
        rows = [{"id": f"{name}{i}", "question": 2 * a, "answers": [said[i % 3]]} for i, a in enumerate(asked)]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append({"name": name, "instruction_file": str(file), "question_file": str(file)})
    return tasks


@pytest.fixture(scope="module")
def experiment(toy_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ContinualExperiment:
    folder = tmp_path_factory.mktemp("continual")
    written = ContinualExperiment(
        checkpoint_dir=toy_checkpoint,
        out_dir=folder / "out",
        tasks=write_tasks(folder),
        orders=[list(NAMES)],
        strategies=["sequence", "replay", "merge", "isolated", "o-lora"],
        tokens=2500,
        precision="fp32",
        orthogonality=5.0,
        train=TrainConfig(
            sequence_length=32, micro_batch_size=4, global_batch_size=4, learning_rate=0.02, warmup_steps=3
        ),
        eval=EvalConfig(interval=1000, max_windows=2, probe_style="plain"),
        lora=LoRAConfig(r=RANK, alpha=2 * RANK),
    )
    check(written)
    return prepare(written)


def learned(experiment: ContinualExperiment, strategy: str | dict | None, seed: int, name: str, **other) -> dict:
    """The result of one run, carried out here and left in `runs/name`."""
    out = experiment.out_dir / "runs" / name / "result.json"
    strategies = [] if strategy is None else [strategy]
    with redirect_stderr(io.StringIO()):
        result = carry_out(replace(experiment, strategies=strategies, seeds=[seed], out=out, **other))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result))
    return result


@pytest.fixture(scope="module")
def runs(experiment: ContinualExperiment) -> dict[str, dict]:
    """Results by name; every strategy begins with the adapter that plain sequence begins with."""
    found = {"base": learned(experiment, None, 0, "base"), "isolated": learned(experiment, "isolated", 0, "isolated")}
    for seed in range(3):
        first = experiment.out_dir / "runs" / f"sequence{seed}"
        found[f"sequence{seed}"] = learned(experiment, "sequence", seed, f"sequence{seed}")
        for strategy in ("replay", "o-lora"):
            found[f"{strategy}{seed}"] = learned(experiment, strategy, seed, f"{strategy}{seed}", first_tasks=first)
    first = experiment.out_dir / "runs" / "sequence0"
    found["merge"] = learned(experiment, "merge", 0, "merge", first_tasks=first)
    free = {"name": "o-lora", "orthogonality": 0.0}
    found["stacked"] = learned(experiment, free, 0, "stacked", first_tasks=first)
    return found


def adapter(experiment: ContinualExperiment, run: str, task: str) -> dict[str, torch.Tensor]:
    return load_file(experiment.out_dir / "runs" / run / task / "adapter_model.safetensors")


# --- figures


def test_figures_of_a_matrix_worked_out_by_hand() -> None:
    found = np.array([[0.1, 0.2, 0.0], [0.8, 0.3, 0.1], [0.9, 0.7, 0.2], [0.5, 0.6, 0.9]])
    assert average(found) == pytest.approx((0.5 + 0.6 + 0.9) / 3)
    assert just_learned(found) == pytest.approx((0.8 + 0.7 + 0.9) / 3)
    assert backward_transfer(found) == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)
    assert forgetting(found) == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)  # from the best, not from the first
    assert forward_transfer(found) == pytest.approx(((0.3 - 0.2) + (0.2 - 0.0)) / 2)


def test_matrices_of_a_sequence_of_isolated_adapters_and_of_joint_training() -> None:
    def scores(**values: float) -> dict:
        return {task: {"loss": value} for task, value in values.items()}

    base = {"stages": [{"learned": [], "scores": scores(a=9, b=8)}]}
    sequence = [
        {"learned": ["b"], "scores": scores(a=7, b=2)},
        {"learned": ["b", "a"], "scores": scores(a=1, b=5)},
    ]
    assert matrix({"stages": sequence}, ["b", "a"], base, "loss").tolist() == [[8, 9], [2, 7], [5, 1]]
    alone = {"stages": [{"learned": ["a"], "scores": scores(a=3)}, {"learned": ["b"], "scores": scores(b=4)}]}
    assert matrix(alone, ["b", "a"], base, "loss").tolist() == [[8, 9], [4, 9], [4, 3]]
    joint = matrix({"stages": [{"learned": ["a", "b"], "scores": scores(a=6, b=5)}]}, ["b", "a"], base, "loss")
    assert np.isnan(joint[1]).all() and joint[2].tolist() == [5, 6]


# --- O-LoRA


def test_penalty_and_its_gradient_are_those_of_the_formula(toy_checkpoint: Path) -> None:
    model = load_model(toy_checkpoint, torch.float32)
    inject_lora(model, LoRAConfig(r=3, targets=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    expected, gradients = 0.0, []
    for _, layer in lora_layers(model):
        before = torch.randn(5, layer.lora_A.shape[1])
        layer.stack_on(before, torch.randn(layer.lora_B.shape[0], 5))
        old, new = before.double().numpy(), layer.lora_A.detach().double().numpy()
        expected += 0.5 * np.abs(old @ new.T).sum()
        gradients.append(0.5 * np.sign(old @ new.T).T @ old)
    loss = Orthogonality(model, 0.5).loss()
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for (_, layer), gradient in zip(lora_layers(model), gradients, strict=True):
        np.testing.assert_allclose(layer.lora_A.grad.numpy(), gradient, rtol=1e-4, atol=1e-5)
        assert layer.lora_B.grad is None


def test_olora_keeps_to_other_directions_and_leaves_earlier_adapters_as_they_are(experiment, runs) -> None:
    with_penalty, without = (runs[name]["stages"][-1]["overlap"]["after"] for name in ("o-lora0", "stacked"))
    assert with_penalty * 10 <= without
    before, after = adapter(experiment, "o-lora0", "shapes"), adapter(experiment, "o-lora0", "tools")
    first = adapter(experiment, "sequence0", "colours")
    for name, kept in before.items():
        dim = 0 if ".lora_A." in name else 1
        assert torch.equal(after[name].narrow(dim, RANK, 2 * RANK), kept)
        assert torch.equal(kept.narrow(dim, RANK, RANK), first[name])


def test_recorded_overlap_is_that_of_the_stored_adapter(experiment, runs) -> None:
    stored = adapter(experiment, "o-lora0", "tools")
    rows = [tensor.double().split((RANK, 2 * RANK)) for name, tensor in stored.items() if ".lora_A." in name]
    expected = sum((old @ new.T).abs().sum().item() for new, old in rows)
    assert runs["o-lora0"]["stages"][-1]["overlap"]["after"] == pytest.approx(expected, rel=1e-4)


# --- what strategies forget


def test_olora_and_replay_forget_less_than_a_plain_sequence_at_every_seed(runs) -> None:
    for seed in range(3):
        lost = {}
        for strategy in ("sequence", "replay", "o-lora"):
            result = runs[f"{strategy}{seed}"]
            lost[strategy] = forgetting(-matrix(result, NAMES, runs["base"], "loss"))
            assert just_learned(matrix(result, NAMES, runs["base"], "exact_match")) > 0.5
        assert lost["replay"] < 0.7 * lost["sequence"] and lost["o-lora"] < 0.7 * lost["sequence"]
        assert forgetting(matrix(runs[f"sequence{seed}"], NAMES, runs["base"], "exact_match")) > 0.5


def test_isolated_adapters_forget_exactly_nothing(runs) -> None:
    for measure, sign in (("exact_match", 1), ("loss", -1)):
        found = matrix(runs["isolated"], NAMES, runs["base"], measure)
        assert forgetting(sign * found) == 0 == backward_transfer(found) == forward_transfer(found)
    assert just_learned(matrix(runs["isolated"], NAMES, runs["base"], "exact_match")) > 0.9
    # A sequence begins with what an isolated adapter of the same seed is.
    alone, first = (runs[name]["stages"][0]["scores"]["colours"] for name in ("isolated", "sequence0"))
    assert alone == first


def test_a_sequence_stays_within_its_rank_and_olora_adds_one_a_task(experiment, runs) -> None:
    def ranks(run: str, new: int | None = None) -> list[int]:
        stored = adapter(experiment, run, "tools")
        found = []
        for name, lora_A in stored.items():
            if ".lora_A." in name:
                lora_B = stored[name.replace("lora_A", "lora_B")]
                values = torch.linalg.svdvals(lora_B[:, :new].double() @ lora_A[:new].double())
                found.append(int((values > 1e-9 * values[0]).sum()))
        return found

    assert max(ranks("sequence0")) == RANK == max(ranks("o-lora0", RANK))
    assert RANK < max(ranks("o-lora0")) <= 3 * RANK


def test_the_base_of_a_merged_task_is_the_base_and_the_adapters_before(experiment, runs, toy_checkpoint) -> None:
    name = "model.layers.0.mlp.down_proj"
    weight = load_file(toy_checkpoint / "model.safetensors")[f"{name}.weight"].double()
    for run, task in (("sequence0", "colours"), ("merge", "shapes")):
        stored = adapter(experiment, run, task)
        A, B = (stored[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        weight += 2.0 * B @ A
    merged = load_file(experiment.out_dir / "runs" / "merge" / "tools-base" / "model.safetensors")
    torch.testing.assert_close(merged[f"{name}.weight"].double(), weight, rtol=1e-5, atol=1e-6)


def test_peft_computes_the_same_by_an_adapter_of_several_tasks(experiment, runs, toy_checkpoint) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    adapter_dir = experiment.out_dir / "runs" / "o-lora0" / "tools"
    ids = torch.randint(3, 320, (2, 12), generator=torch.Generator().manual_seed(0))
    oracle = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(toy_checkpoint), adapter_dir).eval()
    model = load_model(toy_checkpoint, torch.float32).eval()
    load_adapter(model, adapter_dir)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), oracle(ids).logits, rtol=1e-4, atol=1e-4)


# --- replay


def test_replay_comes_on_top_as_its_ratio_says(experiment: ContinualExperiment, toy_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(toy_checkpoint)
    stores = {name: train_windows(experiment, task, tokenizer, 0) for name, task in tasks_of(experiment).items()}
    course = mixed([(stores["tools"], 800), (stores["colours"], 100), (stores["shapes"], 100)], seed=3)
    tokens = {}
    for name, windows in stores.items():
        ((path, own),) = windows.items()
        counts = [count for source, count in course.windows_by_source.items() if source.endswith(path)]
        tokens[name] = sum(counts) * own.tokens_per_window
    assert tokens["colours"] + tokens["shapes"] == pytest.approx(sum(tokens.values()) / 5, rel=0.15)
    assert tokens["tools"] == pytest.approx(800, rel=0.05)


def test_a_model_writes_what_it_has_learned(experiment, runs, toy_checkpoint, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(toy_checkpoint)
    task = tasks_of(experiment)["colours"]
    (source,) = (windows.store for windows in train_windows(experiment, task, tokenizer, 0).values())
    model = load_model(toy_checkpoint, torch.float32).eval()
    load_adapter(model, experiment.out_dir / "runs" / "isolated" / "colours")
    write_generated(model, tokenizer, [source], tmp_path / "store", tokens=1000, length=32, seed=0)
    written = TokenStore.open(tmp_path / "store", "train", tokenizer.sha256)
    assert written.num_documents == source.num_documents == 6
    # It knows all answers, so what it says, up to the token that ends it, is what it was taught.
    for number in range(6):
        for ours, taught in zip(written.document(number), source.document(number), strict=True):
            assert ours.tolist() == taught.tolist()
    assert TrainingWindows(written, 32, seed=0).windows_per_epoch >= 1


# --- the experiment


def test_intervals_are_those_of_the_paired_scores(experiment, runs) -> None:
    for planned in (run for wave in planned_runs(experiment) for run in wave):
        kind, seed = planned.recipe, planned.seed
        name = kind if kind in ("base", "isolated") and not seed else f"{kind}{seed}"
        if name in runs:
            place = directory(experiment, planned)
            place.mkdir(parents=True, exist_ok=True)
            (place / "run.json").write_text(json.dumps(planned.identity))
            (place / "result.json").write_text(json.dumps(runs[name]))
    results = collect(experiment, [run for wave in planned_runs(experiment) for run in wave])
    learners = {one.label: one for one in results.learners}
    found = compared(results, learners["o-lora"], learners["sequence"])
    asked, scores = sorted(NAMES), {}
    for label in ("o-lora", "sequence"):
        ends = [runs[f"{label}{seed}"]["stages"][-1]["scores"] for seed in range(3)]
        scores[label] = [[row["exact_match"] for task in asked for row in end[task]["questions"]] for end in ends]
    entities = [f"{task}: {task}{number}" for task in asked for number in range(6)]
    assert found == pytest.approx(paired_difference(scores["o-lora"], scores["sequence"], entities))
    assert backward(results, learners["isolated"])[:3] == (0, 0, 0)
    lost = backward(results, learners["sequence"])
    matrices = [matrix(runs[f"sequence{seed}"], NAMES, runs["base"], "exact_match") for seed in range(3)]
    assert lost.value == pytest.approx(np.mean([backward_transfer(one) for one in matrices]))
    assert -1 <= lost.low <= lost.value <= lost.high <= 0
    lines = [json.loads(line) for line in (experiment.out_dir / "results.jsonl").read_text().splitlines()]
    assert {line["status"] for line in lines} == {"finished", "not run"}
    write_report(results, "python finetune/continual.py --config experiment.yaml")
    report = (experiment.out_dir / "report.md").read_text()
    assert "over plain sequence" in report and "| o-lora, after shapes" in report


def without_costs(value: object) -> object:
    """A result but for what it took, and where."""
    if isinstance(value, dict):
        dropped = ("costs", "hardware", "versions", "source")
        return {key: without_costs(item) for key, item in value.items() if key not in dropped}
    return [without_costs(item) for item in value] if isinstance(value, list) else value


def spelled(experiment: ContinualExperiment) -> list[str]:
    """An experiment as options of the script."""
    given = {key: value for key, value in plain_arguments(experiment).items() if value is not None}
    return [
        text
        for key, value in given.items()
        for text in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def test_a_run_that_is_killed_goes_on_to_the_same_result(experiment: ContinualExperiment, tmp_path: Path) -> None:
    place = tmp_path / "killed"
    options = EvalConfig(interval=2, max_windows=1, probe_style="plain")
    small = replace(experiment, strategies=["generative"], seeds=[3], tokens=1500, eval=options)
    # Killed in the second task, after a state was saved and before the task was done.
    command = [sys.executable, str(ROOT / "finetune/continual.py"), *spelled(replace(small, out=place / "result.json"))]
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while not (place / "shapes/state/state.json").is_file():
            assert process.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert not (place / "shapes/report.json").exists() and (place / "colours.json").is_file()
    told = io.StringIO()
    with redirect_stderr(told):
        again = carry_out(replace(small, out=place / "result.json"))
        whole = carry_out(replace(small, out=tmp_path / "whole/result.json"))
    assert told.getvalue().count("resuming") == 1
    assert without_costs(again) == without_costs(whole)
    for task in NAMES:
        file = f"{task}/adapter_model.safetensors"
        assert (place / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_an_experiment_reports_what_finished_and_what_failed(experiment: ContinualExperiment, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = {
        "checkpoint_dir": str(experiment.checkpoint_dir),
        "out_dir": str(out),
        "tasks": write_tasks(tmp_path)[:2],
        "strategies": ["isolated", "joint"],
        "seeds": [0],
        "tokens": 100,
        "precision": "fp32",
        "train": {"sequence_length": 32},
        "eval": {"probe_style": "plain"},
        "lora": {"r": 2},
        "devices": ["cpu", "cpu"],
        "threads": 1,
        "keep_only_adapters": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small))
    blocked = out / "runs/joint.seed0/joint"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    process = run_script("finetune/continual.py", "--config", tmp_path / "run.yaml")
    assert "joint.seed0 failed" in process.stderr and "| isolated" in process.stdout
    assert "joint.seed0 | failed" in (out / "report.md").read_text()
    assert (out / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    lines = {row["run"]: row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
    assert lines["isolated.seed0"]["accuracy"]["forgetting"] == 0 and lines["joint.seed0"]["status"] == "failed"
    assert not list(out.glob("runs/*/*/state"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": slice(0, 1)}, "at least two"),
        ({"tasks": [0, 0]}, "another task is called 'colours'"),
        ({"strategies": ["rehearsal"]}, "'rehearsal' is none of"),
        ({"strategies": [{"name": "replay", "ratio": 1}]}, "'ratio' is none of the keys"),
        ({"strategies": ["replay", "replay"]}, "is there twice"),
        ({"strategies": [{"name": "replay", "replay_ratio": 1}]}, "must lie between 0 and 1"),
        ({"orders": [["colours"]]}, "does not name each"),
        ({"orders": [list(NAMES), list(NAMES)]}, "is there twice"),
        ({"seeds": [1, 1]}, "no seed twice"),
        ({"lora": LoRAConfig(init="pissa")}, "kaiming"),
        ({"lora": LoRAConfig(dora=True), "strategies": ["o-lora"]}, "o-lora stacks"),
    ],
)
def test_an_experiment_that_makes_no_sense_is_refused(experiment, change: dict, message: str) -> None:
    tasks = change.get("tasks")
    if tasks is not None:
        given = experiment.tasks
        change = {"tasks": given[tasks] if isinstance(tasks, slice) else [given[number] for number in tasks]}
    with pytest.raises(InputError, match=message) as raised:
        check(replace(experiment, **change))
    assert "\n" not in str(raised.value)


def test_data_of_another_tokenizer_are_refused_in_one_line(experiment, tmp_path: Path) -> None:
    foreign = tmp_path / "store"
    shutil.copytree(tasks_of(experiment)["tools"].data_dirs[0], foreign)
    meta = json.loads((foreign / "meta.json").read_text())
    meta["tokenizer"]["sha256"] = "0" * 64
    (foreign / "meta.json").write_text(json.dumps(meta))
    changed = replace(
        experiment, tasks=[*experiment.tasks[:2], {**experiment.tasks[2], "data_dir": str(foreign)}],
        out_dir=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(InputError, match="another tokenizer") as raised:
        check(changed)
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()
