"""Does a tree of LoRA adapters learn four domains better than one adapter? Against its baselines, on the same tokens.

python -m benchmarks.experts.tree --checkpoint_dir checkpoints/smollm2-135m-instruct

Every arm takes the same pieces in the same order (a seed is order and initial values), and its update is scaled alike:
alpha / r would give a higher rank longer steps, which in a short run would be its whole advantage.

rates         the learning rate of the next two, on a seed of its own
mixed         four domains at equal tokens; loss on held-out pieces
single        one domain alone, where a tree has nothing to tell apart; loss on held-out pieces of it
absorb_rates  the learning rate of the last, likewise
absorb        rank 1 in one layer of each block, many passes over few pieces; loss on those very pieces
"""

import json
from pathlib import Path
from typing import Any, Literal

from benchmarks.experts.texts import DOMAINS, read_domains
from benchmarks.experts.tree_run import ARMS
from benchmarks.finetune.runs import Run, complete, interval, read
from lit_llama.command_line import run
from lit_llama.files import write_json
from lit_llama.hardware import run_environment
from lit_llama.tokenizer import Tokenizer

PLAIN = ("LoRA, one leaf's rank", "LoRA, all leaves' rank")
RATES, ABSORB_RATES = ("1e-3", "3e-3", "1e-2"), ("1e-2", "3e-2")
RATE = "3e-3"
"""Of all arms: the best of RATES for plain LoRA and for the tree."""
ABSORB_RATE = "3e-2"
"""The best of ABSORB_RATES for both."""
COMPARED = (*PLAIN, "random tree")
"""Arms that the others are compared with: fewer and as many parameters, and routing that has learned nothing."""
SMALL = ("--r", "1", "--targets", '["down_proj"]', "--measured_split", "train")
EXPERIMENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "rates": {
        f"{arm}, {rate}": ("--arm", arm, "--learning_rate", rate) for rate in RATES for arm in (PLAIN[0], "tree")
    },
    "mixed": {arm: ("--arm", arm, "--learning_rate", RATE) for arm in ARMS},
    "single": {
        arm: ("--arm", arm, "--learning_rate", RATE, "--domains", '["weaknesses"]') for arm in ("base", *PLAIN, "tree")
    },
    "absorb_rates": {
        f"{arm}, {rate}": ("--arm", arm, "--learning_rate", rate, *SMALL)
        for rate in ABSORB_RATES
        for arm in (PLAIN[1], "tree")
    },
    "absorb": {arm: ("--arm", arm, "--learning_rate", ABSORB_RATE, *SMALL) for arm in ("base", *PLAIN, "tree")},
}
"""Options of `tree_run.py` for each arm."""
RATES_SEED = 100
"""Not among those that are compared."""
TIERS: dict[str, dict[str, dict[str, float]]] = {
    "cpu": {
        "rates": {"tokens": 10_000, "val_tokens": 2_000, "epochs": 1},
        "mixed": {"tokens": 10_000, "val_tokens": 2_000, "epochs": 1},
        "single": {"tokens": 10_000, "val_tokens": 2_000, "epochs": 3},
        "absorb_rates": {"tokens": 500, "val_tokens": 500, "epochs": 20},
        "absorb": {"tokens": 500, "val_tokens": 500, "epochs": 20},
    },
    "cuda": {
        "rates": {"tokens": 100_000, "val_tokens": 20_000, "epochs": 3},
        "mixed": {"tokens": 100_000, "val_tokens": 20_000, "epochs": 3},
        "single": {"tokens": 100_000, "val_tokens": 20_000, "epochs": 3},
        "absorb_rates": {"tokens": 50_000, "val_tokens": 5_000, "epochs": 20},
        "absorb": {"tokens": 50_000, "val_tokens": 5_000, "epochs": 20},
    },
}
"""Tokens of each domain, and passes over them."""
PIECE_TOKENS = 200


def main(
    *,
    checkpoint_dir: Path,
    downloads_dir: Path = Path(".downloads"),
    work_dir: Path = Path("out/benchmark-tree"),
    out: Path | None = None,
    tier: Literal["cpu", "cuda"] = "cpu",
    experiments: list[Literal["rates", "mixed", "single", "absorb_rates", "absorb"]] | None = None,
    seeds: int = 3,
    workers: int = 2,
    threads: int = 1,
) -> None:
    """Train and measure; what is done already is not repeated.

    Args:
        checkpoint_dir: Base model.
        downloads_dir: Where the packages with the texts are kept.
        work_dir: Where texts and runs are written.
        out: Write the results to this file too.
        tier: Of tokens; cuda is larger.
        experiments: Only these.
        seeds: Runs an arm.
        workers: Runs at a time.
        threads: CPU threads of each.
    """
    tokenizer = Tokenizer.from_checkpoint(checkpoint_dir)
    results: dict[str, Any] = {"setting": {"model": checkpoint_dir.name, "tier": tier, "seeds": seeds}}
    for experiment in experiments or list(EXPERIMENTS):
        arms = EXPERIMENTS[experiment]
        size = TIERS[tier][experiment]
        texts = work_dir / f"{experiment}.json"
        if not texts.is_file():
            domains = read_domains(downloads_dir, tokenizer, int(size["tokens"]), int(size["val_tokens"]), PIECE_TOKENS)
            write_json(texts, domains)
        runs = {
            arm: [
                Run(
                    "benchmarks/experts/tree_run.py",
                    work_dir / experiment / f"{arm.replace(', ', '-').replace(' ', '-')}-seed-{seed}",
                    ("--checkpoint_dir", str(checkpoint_dir), "--texts_file", str(texts))
                    + ("--seed", str(seed), "--epochs", str(size["epochs"]), *options),
                )
                for seed in ([RATES_SEED] if experiment.endswith("rates") else [0] if arm == "base" else range(seeds))
            ]
            for arm, options in arms.items()
        }
        # Seed by seed, so that what is done when it is stopped can be compared.
        complete([own[seed] for seed in range(seeds) for own in runs.values() if seed < len(own)], workers, threads)
        measured = {arm: [read(one, "measured.json") for one in own] for arm, own in runs.items()}
        results[experiment] = {"tokens_a_domain": size["tokens"], "epochs": size["epochs"], "arms": {}}
        for arm, own in measured.items():
            others = {name: measured[name] for name in COMPARED if name in measured and name != arm}
            results[experiment]["arms"][arm] = summary(own, others)
    results |= run_environment()
    if out is not None:
        write_json(out, results)
    print(json.dumps(results, indent=2))


def summary(own: list[dict[str, Any]], others: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds with intervals; differences of the pooled loss to the other arms, seed by seed."""
    found: dict[str, Any] = {
        "pooled_loss": interval([one["pooled_loss"] for one in own]),
        "loss": {domain: interval([one["loss"][domain] for one in own]) for domain in DOMAINS},
        "prefill_tokens_per_second": interval([one["prefill_tokens_per_second"] for one in own]),
        "decode_tokens_per_second": {
            batch: interval([one["decode_tokens_per_second"][batch] for one in own])
            for batch in own[0]["decode_tokens_per_second"]
        },
    }
    for name, other in others.items():
        if len(own) == len(other):
            differences = [one["pooled_loss"] - two["pooled_loss"] for one, two in zip(own, other, strict=True)]
            found[f"pooled_loss_over {name}"] = interval(differences)
    if "soft_pooled_loss" in own[0]:
        found["soft_hard_gap"] = interval([one["pooled_loss"] - one["soft_pooled_loss"] for one in own])
    if "routing" in own[0]:
        found |= {name: interval([one["routing"][name] for one in own]) for name in own[0]["routing"]}
        found["leaf_domain_information"] = interval([one["leaf_domain_information"] for one in own])
    if own[0]["report"]:
        for name in ("tokens_per_second", "peak_memory_gb", "trainable_parameters"):
            found[name] = interval([one["report"][name] for one in own])
    return found


if __name__ == "__main__":
    run(main)
