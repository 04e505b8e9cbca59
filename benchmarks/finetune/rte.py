"""Recognising textual entailment (GLUE RTE) with LoRA: a published recipe, and the same at a tuned learning rate.

python -m benchmarks.finetune.rte --rte_dir DIRECTORY --checkpoint_dir checkpoints/smollm2-135m-instruct

The recipe: LoRA of rank 32, alpha 64 on q and v plus the head, 5 epochs, batches of 16, warm-up over a tenth. The
learning rate is chosen and the best epoch selected on rows of train that are held out; dev is only scored.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

from benchmarks.finetune.runs import ROOT, Run, complete, interval, read
from lit_llama.classification import read_labelled
from lit_llama.command_line import progress, run
from lit_llama.evaluation.questions import wilson_interval
from lit_llama.files import write_json
from lit_llama.hardware import run_environment

RECIPE_RATE = 2e-5
OTHER_RATES = (2e-4,)
EPOCHS, BATCH = 5, 16
TIERS = {"cpu": {"pairs": 800, "seeds": 3}, "cuda": {"pairs": None, "seeds": 5}}


def main(
    *,
    rte_dir: Path,
    checkpoint_dir: Path,
    work_dir: Path = Path("out/benchmark-rte"),
    out: Path | None = None,
    tier: Literal["cpu", "cuda"] = "cpu",
    workers: int = 2,
    threads: int = 1,
) -> None:
    """Train and score; runs that are done already are not repeated.

    Args:
        rte_dir: Where train.tsv and dev.tsv of GLUE RTE lie.
        checkpoint_dir: Base model.
        work_dir: Where runs are written.
        out: Write the results to this file too.
        tier: cpu: the first 800 pairs of train, 3 seeds. cuda: all pairs, 5 seeds.
        workers: Runs at a time.
        threads: CPU threads of each.
    """
    pairs, seeds = TIERS[tier]["pairs"], TIERS[tier]["seeds"]
    lines = (rte_dir / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    work_dir.mkdir(parents=True, exist_ok=True)
    train_file = work_dir / "train.tsv"
    train_file.write_text("".join(lines[: None if pairs is None else pairs + 1]), encoding="utf-8")
    steps = 9 * (len(lines) if pairs is None else pairs) // (10 * BATCH)  # an epoch; a tenth is held out

    def planned(rate: float, seed: int) -> Run:
        options = {
            "checkpoint_dir": checkpoint_dir, "train_file": train_file, "test_file": rte_dir / "dev.tsv",
            "lora.r": 32, "lora.alpha": 64, "lora.targets": "[q_proj, v_proj]", "train.epochs": EPOCHS,
            "train.learning_rate": rate, "train.final_learning_rate": 0.0, "train.warmup_steps": steps * EPOCHS // 10,
            "train.global_batch_size": BATCH, "train.micro_batch_size": BATCH, "train.seed": seed,
            "eval.interval": steps, "eval.batch_size": 32, "eval.max_windows": "null",
        }  # fmt: skip
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return Run("finetune/classify.py", work_dir / f"rate-{rate:g}-seed-{seed}", tuple(arguments))

    rates = (RECIPE_RATE, *OTHER_RATES)
    complete([planned(rate, 0) for rate in rates], workers, threads)
    held_out = {rate: selected(planned(rate, 0), "val")["accuracy"] for rate in rates}
    tuned = max(rates, key=lambda rate: held_out[rate])
    chosen = sorted({RECIPE_RATE, tuned})
    complete([planned(rate, seed) for rate in chosen for seed in range(seeds)], workers, threads)

    dev, _ = read_labelled(rte_dir / "dev.tsv", None, "label", need_label=True)
    counts = [sum(row.label == label for row in dev) for label in sorted({row.label for row in dev})]
    result = {
        "setting": {
            "model": checkpoint_dir.name,
            "tier": tier,
            "train_pairs": pairs or len(lines) - 1,
            "dev": sum(counts),
        },
        "majority": max(counts) / sum(counts),
        "base, asked": asked_base(checkpoint_dir, rte_dir, work_dir),
        "held-out accuracy by rate, seed 0": {f"{rate:g}": value for rate, value in held_out.items()},
        "tuned_rate": tuned,
        "rates": {},
    }
    for rate in chosen:
        runs = [planned(rate, seed) for seed in range(seeds)]
        scores = [selected(one, "test") for one in runs]
        result["rates"][f"{rate:g}"] = {
            **{name: interval([score[name] for score in scores]) for name in ("accuracy", "f1", "matthews")},
            "confusion of seed 0": scores[0]["confusion"],
            "wilson_of_seed_0": wilson_interval(scores[0]["accuracy"] * sum(counts), sum(counts)),
            "training_seconds": interval([read(one, "report.json")["training_seconds"] for one in runs]),
            "trainable_parameters": read(runs[0], "report.json")["trainable_parameters"],
        }
    result |= run_environment()
    if out is not None:
        write_json(out, result)
    print(json.dumps(result, indent=2))


def selected(one: Run, part: str) -> dict:
    """Scores of a run's best epoch on "val" or "test"."""
    scores = read(one, "evaluation.json")
    return scores.get("best", scores["last"])[part]


def asked_base(checkpoint_dir: Path, rte_dir: Path, work_dir: Path) -> float:
    """Accuracy of the base on dev when it is asked in words and the likelier of two answers counts."""
    template = "{sentence1}\nQuestion: {sentence2} True or False?"
    rows, _ = read_labelled(rte_dir / "dev.tsv", template, "label", need_label=True)
    answers = {"entailment": "True", "not_entailment": "False"}
    questions = [{"question": row.text, "answers": [answers[row.label]], "choices": ["True", "False"]} for row in rows]
    file, out = work_dir / "dev-questions.jsonl", work_dir / "base.json"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    if not out.is_file():
        progress("asking the base")
        command = [sys.executable, str(ROOT / "scripts/evaluate.py"), "--checkpoint_dir", str(checkpoint_dir)]
        command += ["--question_file", str(file), "--max_new_tokens", "4", "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())["multiple_choice"]["log_likelihood"]


if __name__ == "__main__":
    run(main)
