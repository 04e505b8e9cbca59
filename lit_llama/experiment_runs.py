"""Carrying out the runs of an experiment: each a process of its own, several at once, resumed after an interruption.

A run that fails or runs out of memory leaves the others alone. In `out_dir/runs/NAME/` lie, besides what its scripts
write there:

    run.json   its commands, by which a finished run is known again
    log.txt    what its processes said

Which runs there are, and what is made of their results, is the business of who has them carried out: comparing recipes
(`injection.comparison`), learning task after task (`continual_experiment`).
"""

import itertools
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lit_llama.command_line import progress
from lit_llama.errors import InputError, RunError
from lit_llama.files import read_json, write_json


@dataclass(kw_only=True)
class RunOptions:
    """Where and how the runs of an experiment are carried out."""

    out_dir: Path
    """Folder for runs, results.jsonl and the report."""
    devices: list[str] = field(default_factory=lambda: ["auto"])
    """Where runs are carried out, one at a time on each: cuda:0, cuda:1, ... or cpu; [auto]: every CUDA card, or the
    CPU twice, as two small runs use its cores better than one."""
    threads: int | None = None
    """CPU threads of a run; by default a fair share of them."""
    keep_only_adapters: bool = False
    """After a run, remove what only a resume needs, and whole checkpoints."""
    action: Literal["run", "plan", "report"] = "run"
    """run: carry out what is not finished, then report. plan: say what would be run first. report: of what is there."""
    overwrite: bool = False
    """Repeat runs whose options have changed since they were carried out."""


@dataclass(frozen=True)
class Run:
    """One run, or a control: then without learner and seed. `recipe` and `learner` are names in the report."""

    name: str
    recipe: str
    learner: str | None
    seed: int | None
    options: dict[str, Any]
    training: tuple[str, ...] | None
    """Arguments of `Scripts.train`."""
    evaluations: dict[str, tuple[str, ...]]
    """Arguments of `Scripts.evaluate`, by the name of the file that it writes."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a finished run to count."""
        return {"training": self.training and list(self.training), **{k: list(v) for k, v in self.evaluations.items()}}


class Scripts(NamedTuple):
    """The programs that a run starts."""

    train: Path
    """As finetune/inject.py."""
    evaluate: Path
    """As scripts/evaluate_knowledge.py."""


def directory(experiment: RunOptions, run: Run) -> Path:
    """Where a run's files lie."""
    return experiment.out_dir / "runs" / run.name


def is_finished(experiment: RunOptions, run: Run) -> bool:
    """Whether a run has been evaluated, with the options that it has now."""
    place = directory(experiment, run)
    done = all((place / file).is_file() for file in ("run.json", *run.evaluations))
    return done and read_json(place / "run.json") == run.identity


def execute(experiment: RunOptions, scripts: Scripts, runs: Sequence[Run]) -> None:
    """Carry out runs, one at a time on each device; one that fails is told of and leaves the others alone.

    Ctrl-C and a termination signal end the processes, which keep what a resume needs, before this returns.
    """
    waiting = [run for run in runs if not is_finished(experiment, run)] if experiment.action == "run" else []
    for run in waiting:
        _refuse_other_options(experiment, run)
    if waiting and len(waiting) < len(runs):
        progress(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already")
    workplaces = devices_of(experiment)
    threads = experiment.threads or max(1, torch.get_num_threads() // len(workplaces))
    devices: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in workplaces:
        devices.put(device)
    stopping, telling = threading.Event(), threading.Lock()

    def tell(message: str) -> None:
        with telling:
            progress(message)

    def work(numbered: tuple[int, Run]) -> None:
        number, run = numbered
        if stopping.is_set():
            return
        device = devices.get()
        tell(f"[{number}/{len(waiting)}] {run.name} on {device}")
        try:
            _carry_out_one(experiment, scripts, run, _environment(device, threads), stopping)
        except RunError as error:
            tell(f"{run.name} failed: {error}")
        finally:
            devices.put(device)

    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(len(workplaces)) as pool:
            try:
                for _ in pool.map(work, enumerate(waiting, start=1)):
                    pass
            except BaseException:
                stopping.set()
                raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _refuse_other_options(experiment: RunOptions, run: Run) -> None:
    path = directory(experiment, run) / "run.json"
    if not path.is_file() or experiment.overwrite:
        return
    before, now = read_json(path), run.identity
    for part in now:
        if part in before and before[part] != now[part]:
            changed = next(
                (new for old, new in itertools.zip_longest(before[part] or (), now[part] or ()) if old != new), None
            )
            raise InputError(
                f"{path.parent} holds a run with other arguments ({changed or 'one less now'}): choose another out_dir,"
                " or pass --overwrite true to repeat it"
            )


def _carry_out_one(
    experiment: RunOptions, scripts: Scripts, run: Run, environment: Mapping[str, str], stopping: threading.Event
) -> None:
    place = directory(experiment, run)
    log, trained = place / "log.txt", place / "trained"
    before = read_json(place / "run.json") if (place / "run.json").is_file() else run.identity
    same = before["training"] == run.identity["training"]
    # What other options have made goes before the new ones are on record: else a kill in between made it theirs.
    if not same:
        (trained / "report.json").unlink(missing_ok=True)
    for file in run.evaluations:
        if not same or before.get(file) != run.identity[file]:
            (place / file).unlink(missing_ok=True)
    write_json(place / "run.json", run.identity)
    if run.training is not None and not (trained / "report.json").is_file():
        resumable = same and (trained / "state" / "state.json").is_file()
        begun = any(place.glob("trained*"))  # inject.py keeps its examples beside the directory it is given
        again = ("--resume", "true") if resumable else ("--overwrite", "true") if begun else ()
        _call([str(scripts.train), *run.training, *again], log, environment, stopping)
    for file, arguments in run.evaluations.items():
        if not (place / file).is_file():
            _call([str(scripts.evaluate), *arguments, "--out", str(place / file)], log, environment, stopping)
    if experiment.keep_only_adapters:
        for folder in ("state", "checkpoint"):
            shutil.rmtree(trained / folder, ignore_errors=True)


def _call(command: Sequence[str], log: Path, environment: Mapping[str, str], stopping: threading.Event) -> None:
    """Run a Python script to its end, appending what it says to `log`; RunError with its last line if it fails."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C reaches it through us only, once, and its own children with it
        )
        while process.poll() is None:
            if stopping.wait(0.1):
                _end(process)
                raise RunError("interrupted")
    if process.returncode:
        raise RunError(last_line(log) or f"left with status {process.returncode}")


def _end(process: subprocess.Popen, patience: float = 60.0) -> None:
    """Ask a process and its children to stop, then make them."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def devices_of(experiment: RunOptions) -> list[str]:
    """Where runs are carried out, one at a time on each."""
    if experiment.devices != ["auto"]:
        return experiment.devices
    if cards := torch.cuda.device_count():
        return [f"cuda:{card}" for card in range(cards)]
    return ["auto"] if torch.backends.mps.is_available() or torch.get_num_threads() == 1 else ["cpu", "cpu"]


def _environment(device: str, threads: int) -> dict[str, str]:
    """Environment variables that leave a process the one device and so many threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif device.startswith("cuda:"):
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        number = int(device.removeprefix("cuda:"))
        environment["CUDA_VISIBLE_DEVICES"] = visible[number] if number < len(visible) else str(number)
    return environment


def last_line(log: Path) -> str:
    """What a failed process said last: its last line that begins with "error:", else its last line."""
    if not log.is_file():
        return ""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[max((number for number, line in enumerate(lines) if line.startswith("$ ")), default=0) :]
    errors = [line.removeprefix("error:").strip() for line in last if line.startswith("error:")]
    return (errors or last or [""])[-1]
