"""Reproduce published claims about knowledge injection in a small world, and say PASS, FAIL or INCONCLUSIVE of each.

python scripts/reproduce_claims.py --tier smoke --out_dir out/claims
"""

import os
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from lit_llama.command_line import progress, run
from lit_llama.errors import InputError
from lit_llama.files import atomic_file, write_json
from lit_llama.hardware import run_environment
from lit_llama.injection.arms import TIERS, Run, Tier, carry_out, runs_of
from lit_llama.injection.claims import CLAIMS, Results, claims_of, corrected, needed_runs


def main(
    *,
    tier: Literal["smoke", "cpu", "gpu"],
    out_dir: Path,
    claims: str | None = None,
    seeds: list[int] | None = None,
    workers: int | None = None,
) -> None:
    """Train what the claims need and print the table; runs that are finished in out_dir are not repeated.

    Args:
        tier: smoke (two minutes), cpu (an hour and a half on two cores) or gpu.
        out_dir: where runs, claims.md and claims.json are written.
        claims: only these, "C1,C2"; by default all that the tier can run.
        seeds: of the runs; by default 0, 1 and 2.
        workers: runs at a time, one thread each; by default one a CPU core.
    """
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers} must be at least 1")
    chosen = claims_of(tier)
    if claims is not None:
        wanted = [name.strip() for name in claims.split(",")]
        known = {claim.id: claim for claim in CLAIMS}
        if unknown := [name for name in wanted if name not in known]:
            raise InputError(f"--claims {claims}: {unknown[0]!r} is not one of {', '.join(known)}")
        chosen = [claim for claim in chosen if claim.id in wanted]
        if not chosen:
            raise InputError(f"--claims {claims}: the tier {tier} runs none of them; see claims.md of a larger one")
    size = TIERS[tier]
    runs = needed_runs(chosen, runs_of(size))
    seeds = list(dict.fromkeys(seeds or size.seeds))
    results = Results(_carry_out_all(runs, size, seeds, out_dir / tier, workers))
    decisions = corrected({claim.id: claim.decide(results, tier) for claim in chosen})

    lines = ["| claim | published | asked at this tier | verdict | p (Holm) | figures |", "|---|---|---|---|---|---|"]
    for claim in CLAIMS:
        decided = decisions.get(claim.id)
        if decided is None and claims is not None:
            continue
        cells = ("", "not run at this tier", "", "")
        if decided is not None:
            p = "" if decided.p is None else f"{decided.p:.4f}"
            cells = (claim.accept[tier], decided.verdict, p, decided.figures)
        lines.append(f"| {claim.id}: {claim.text} | {claim.published} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    with atomic_file(out_dir / tier / "claims.md") as file:
        file.write(table + "\n")
    record = {name: decision._asdict() for name, decision in decisions.items()}
    write_json(out_dir / tier / "claims.json", {"tier": tier, "claims": record, **run_environment()})
    print(table)


def _carry_out_all(
    runs: list[Run], tier: Tier, seeds: list[int], out_dir: Path, workers: int | None
) -> dict[str, list[dict[str, Any]]]:
    """The results of all runs, by name, one a seed; several at once, each after the one that it starts from."""
    results: dict[tuple[str, int], dict[str, Any]] = {}
    waiting = [(one, seed) for one in runs for seed in seeds]
    under_way: dict[Future, tuple[Run, int]] = {}
    trained, tokens = 0.0, sum(one.tokens for one, _ in waiting)
    progress(f"{len(waiting)} runs, {tokens / 1e6:.1f}M tokens to train on")
    # Each run computes on one thread, also in libraries that count their threads on import.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        while waiting or under_way:
            ready = [(one, seed) for one, seed in waiting if one.start is None or (one.start, seed) in results]
            for one, seed in ready:
                under_way[pool.submit(carry_out, one, tier, seed, out_dir)] = (one, seed)
                waiting.remove((one, seed))
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                one, seed = under_way.pop(future)
                results[one.name, seed] = future.result()
                trained += one.tokens
                progress(f"{trained / tokens:.0%} of the tokens: {one.name}, seed {seed}, is finished")
    return {one.name: [results[one.name, seed] for seed in seeds] for one in runs}


if __name__ == "__main__":
    run(main)
