"""Many runs of the project's scripts, several at once, each done only once; and intervals of their figures."""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama.command_line import progress
from lit_llama.errors import RunError

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Run:
    """One run of a training script, known by its directory."""

    script: str
    out_dir: Path
    options: tuple[str, ...]


def complete(runs: Sequence[Run], workers: int, threads: int) -> None:
    """Run those that are not done yet, `workers` at a time; what an earlier call left unfinished is resumed.

    Each prints to log.txt beside its directory. `RunError` when one fails.
    """
    waiting = [run for run in runs if not _done(run)]
    progress(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already")
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda run: _execute(run, threads), waiting))


def _done(run: Run) -> bool:
    return (run.out_dir / "done").is_file()


def _execute(run: Run, threads: int) -> None:
    resume = ("--resume", "true") if (run.out_dir / "lit_config.yaml").is_file() else ()
    command = [sys.executable, str(ROOT / run.script), "--out_dir", str(run.out_dir), *run.options, *resume]
    run.out_dir.parent.mkdir(parents=True, exist_ok=True)
    log = run.out_dir.with_name(f"{run.out_dir.name}.log")
    start = time.perf_counter()
    with open(log, "a") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        status = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    if status:
        raise RunError(f"{run.out_dir} failed with status {status}: see {log}")
    (run.out_dir / "done").touch()
    progress(f"{run.out_dir.name}: done in {time.perf_counter() - start:.0f} s")


def read(run: Run, file: str) -> Any:
    """The content of a JSON file that a run left."""
    return json.loads((run.out_dir / file).read_text())


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % interval by Student's t over seeds; no interval for one value."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return {"mean": mean, "values": list(values)}
    half = _T_975[n - 1] * statistics.stdev(values) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": list(values)}


_T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""The 97.5 % point of Student's t by degrees of freedom."""
