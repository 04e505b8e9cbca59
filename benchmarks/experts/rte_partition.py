"""Recognising textual entailment (GLUE RTE) with LoRA on a dense model, and on one whose MLPs are routed experts.

python -m benchmarks.experts.rte_partition --rte_dir DIRECTORY --checkpoint_dir checkpoints/smollm2-135m-instruct

The claim under test: 71.3 -> 72.9 % by routing (TinyLlama, 32 experts, 16 a token). Arms with identical settings and
seeds: dense; clusters by k-means, routed in training and evaluation; random clusters, routed likewise. Every run is
scored on dev after its last step: no epoch, rate or seed is selected. Differences are paired by example and seed.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.finetune.runs import ROOT, Run, complete, interval, read
from lit_llama.checkpoint import load_model
from lit_llama.classification import read_labelled
from lit_llama.command_line import progress, run
from lit_llama.errors import InputError
from lit_llama.evaluation.questions import evaluate_choices
from lit_llama.evaluation.statistics import paired_difference
from lit_llama.files import read_json, write_json
from lit_llama.hardware import run_environment
from lit_llama.mlp_partition import MLPRoutingConfig, route_mlp
from lit_llama.prompts import detect_style
from lit_llama.tokenizer import Tokenizer

BATCH = 16
ARMS = ("dense", "kmeans", "random")


def main(
    *,
    rte_dir: Path,
    checkpoint_dir: Path,
    work_dir: Path = Path("out/benchmark-rte-partition"),
    out: Path | None = None,
    pairs: int | None = 800,
    epochs: int = 3,
    seeds: int = 5,
    learning_rate: float = 2e-4,
    n_experts: int = 32,
    top_k: int = 16,
    layers: list[int] | None = [10, 12, 14, 16, 18, 20],  # noqa: B006  never changed
    workers: int = 2,
    threads: int = 1,
) -> None:
    """Partition, train and score; what is done already is not repeated.

    Args:
        rte_dir: Where train.tsv and dev.tsv of GLUE RTE lie.
        checkpoint_dir: Dense base model.
        work_dir: Where checkpoints and runs are written.
        out: Write the results to this file too.
        pairs: Train on the first so many pairs; a tenth of them is held out and only watched. null: all.
        epochs: Passes over them; runs are scored after the last.
        seeds: Runs an arm.
        learning_rate: Peak, for all arms; 2e-4 is the better of the two that benchmarks/finetune/rte.py tries.
        n_experts: Experts an MLP is partitioned into.
        top_k: Experts a token.
        layers: Decoder layers that route; by default those of the claim's code. null: all, which leaves little of a
            model that was not trained for it: its first layer suffers most.
        workers: Runs at a time.
        threads: CPU threads of each.
    """
    torch.set_num_threads(threads)
    lines = (rte_dir / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    work_dir.mkdir(parents=True, exist_ok=True)
    train_file, dev_file = work_dir / "train.tsv", rte_dir / "dev.tsv"
    train_file.write_text("".join(lines[: None if pairs is None else pairs + 1]), encoding="utf-8")
    count = len(lines) - 1 if pairs is None else pairs
    steps = epochs * (9 * count // (10 * BATCH))
    setting = {
        "model": checkpoint_dir.name, "train_pairs": count, "epochs": epochs, "learning_rate": learning_rate,
        "n_experts": n_experts, "top_k": top_k, "layers": layers,
    }  # fmt: skip
    if (work_dir / "setting.json").is_file() and read_json(work_dir / "setting.json") != setting:
        raise InputError(f"{work_dir} holds runs of another setting; choose another --work_dir")
    write_json(work_dir / "setting.json", setting)
    bases = {arm: base_of(arm, checkpoint_dir, work_dir, n_experts) for arm in ARMS}
    routing = {"partition.top_k": top_k, "partition.layers": layers or "null"}

    def planned(arm: str, seed: int) -> Run:
        options = {
            "checkpoint_dir": bases[arm], "train_file": train_file, "test_file": dev_file, "lora.r": 32,
            "lora.alpha": 64, "lora.targets": "[q_proj, v_proj]", "train.epochs": epochs,
            "train.learning_rate": learning_rate, "train.final_learning_rate": 0.0, "train.warmup_steps": steps // 10,
            "train.global_batch_size": BATCH, "train.micro_batch_size": BATCH, "train.seed": seed,
            "eval.interval": max(1, steps // 2), "eval.batch_size": 32, "eval.max_windows": "null",
            **({} if arm == "dense" else routing),
        }  # fmt: skip
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return Run("finetune/classify.py", work_dir / f"{arm}-seed-{seed}", tuple(arguments))

    dev, _ = read_labelled(dev_file, None, "label", need_label=True)
    before = {arm: asked(arm, bases[arm], dev_file, work_dir, top_k, layers) for arm in ARMS}
    runs = {arm: [planned(arm, seed) for seed in range(seeds)] for arm in ARMS}
    # Seed by seed, so that what is done when it is stopped are whole pairs.
    complete([runs[arm][seed] for seed in range(seeds) for arm in ARMS], workers, threads)
    right = {arm: [correct(bases[arm], one, dev_file) for one in runs[arm]] for arm in ARMS}
    result = {
        "setting": {**setting, "seeds": seeds, "dev": len(dev)},
        "arms": {},
        "differences": {},
    }
    for arm in ARMS:
        result["arms"][arm] = {
            "accuracy before finetuning, asked": sum(before[arm]) / len(dev),
            "accuracy": interval([sum(scores) / len(dev) for scores in right[arm]]),
            "held-out loss": interval([read(one, "report.json")["after"]["val_loss"] for one in runs[arm]]),
            "training_seconds": interval([read(one, "report.json")["training_seconds"] for one in runs[arm]]),
            "trainable_parameters": read(runs[arm][0], "report.json")["trainable_parameters"],
        }
    for first, second in (("kmeans", "dense"), ("random", "dense"), ("kmeans", "random")):
        result["differences"][f"{first} - {second}"] = {
            **paired_difference(right[first], right[second], range(len(dev)))._asdict(),
            "mcnemar p by seed": [mcnemar(a, b) for a, b in zip(right[first], right[second], strict=True)],
            "before finetuning": paired_difference(before[first], before[second], range(len(dev)))._asdict(),
        }
    result |= run_environment()
    if out is not None:
        write_json(out, result)
    print(json.dumps(result, indent=2))


def base_of(arm: str, checkpoint_dir: Path, work_dir: Path, n_experts: int) -> Path:
    """The checkpoint of an arm, partitioned where that is not done yet."""
    if arm == "dense":
        return checkpoint_dir
    base = work_dir / f"{arm}-{n_experts}-experts"
    if not base.exists():
        progress(f"partitioning {base}")
        command = [sys.executable, str(ROOT / "scripts/partition_mlp.py"), "--checkpoint_dir", str(checkpoint_dir)]
        command += ["--out_dir", str(base), "--n_experts", str(n_experts), "--clusters", arm]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return base


def asked(arm: str, base: Path, dev_file: Path, work_dir: Path, top_k: int, layers: list[int] | None) -> list[float]:
    """Whether an untrained arm is right about each row of dev, asked in words: the likelier of two answers counts."""
    file = work_dir / (f"asked-{base.name}.json" if arm == "dense" else f"asked-{base.name}-top-{top_k}-{layers}.json")
    if not file.is_file():
        progress(f"asking {base}")
        template = "{sentence1}\nQuestion: {sentence2} True or False?"
        rows, _ = read_labelled(dev_file, template, "label", need_label=True)
        answers = {"entailment": "True", "not_entailment": "False"}
        questions = [{"question": row.text, "answers": [answers[row.label]]} for row in rows]
        questions = [{**question, "choices": ["True", "False"]} for question in questions]
        model = load_model(base)
        if arm != "dense":
            route_mlp(model, MLPRoutingConfig(top_k=top_k, layers=layers))
        tokenizer, style = Tokenizer.from_checkpoint(base), detect_style(base)
        answered = evaluate_choices(model, tokenizer, questions, style)["rows"]
        write_json(file, [row["log_likelihood"] for row in answered])
    return json.loads(file.read_text())


def correct(base: Path, one: Run, dev_file: Path) -> list[float]:
    """Whether a finished run is right about each row of dev, by generate/classify.py."""
    file = one.out_dir / "dev.json"
    if not file.is_file():
        command = [sys.executable, str(ROOT / "generate/classify.py"), "--checkpoint_dir", str(base)]
        command += ["--adapter_dir", str(one.out_dir), "--file", str(dev_file)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        answers = [json.loads(line) for line in printed.splitlines()]
        write_json(file, [float(answer["label"] == answer["expected"]) for answer in answers])
    return json.loads(file.read_text())


def mcnemar(first: list[float], second: list[float]) -> float:
    """Two-sided exact p-value that either of two classifiers is as often right where the other is wrong."""
    gained = sum(a > b for a, b in zip(first, second, strict=True))
    lost = sum(a < b for a, b in zip(first, second, strict=True))
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1)) / 2 ** (gained + lost)
    return min(1.0, 2 * tail)


if __name__ == "__main__":
    run(main)
