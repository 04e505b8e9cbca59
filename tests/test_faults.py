"""Runs that are killed, out of disk space or damaged: what a resume makes of them.

Training runs here are the real script in processes forked from a server that has imported torch already; a run can be
killed before the n-th system call by which Python touches a name in its directory, or after some time.
"""

import csv
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from lightning.fabric import Fabric
from safetensors.torch import load_file, save_file

from lit_llama.data.token_store import TokenStoreWriter
from lit_llama.errors import InputError
from lit_llama.files import atomic_directory, atomic_path, write_json
from lit_llama.optimizer import Optimizer
from lit_llama.run_files import RunFiles, RunState, plain_arguments
from lit_llama.tokenizer import Tokenizer
from lit_llama.tracking import Tracker, read_metrics
from lit_llama.training import TrainingArguments

TIMINGS = {"tokens_per_second", "mfu", "memory_gb", "seconds"}


def kill_before_call(number: int, beginning: Path) -> None:
    """Have this process killed before its `number`-th (from 0) call on a name that begins so."""
    seen = 0

    def look(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "ctypes.dlsym"):
            return
        if event == "ctypes.dlsym" and arguments[1] == "renameat2" or str(arguments[0]).startswith(str(beginning)):
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(look)


def killed_at_each_call(action: Callable[[], None], directory: Path) -> Iterator[int]:
    """Run `action` in forked processes, killed before the first call in `directory`, the second, ... until it ends."""
    for number in range(200):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                kill_before_call(number, directory)
                action()
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), f"the process failed before call {number}"
        yield number
        if status == 0:
            return


# --- directories and saves, at every call


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("swap", [True, False])
def test_a_directory_is_old_or_new_whenever_its_writer_is_killed(
    swap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swap:  # as on a filesystem that cannot swap names
        monkeypatch.setattr("lit_llama.files._swap", lambda one, other: False)
    path = tmp_path / "outer" / "out"
    old, new = {"a": b"old", "sub/b": b"old"}, {"a": b"new", "sub/c": b"new"}

    def write(files: dict[str, bytes]) -> None:
        with atomic_directory(path, overwrite=True) as directory:
            (directory / "sub").mkdir()
            for name, data in files.items():
                (directory / name).write_bytes(data)

    seen = []
    write(old)
    for _ in killed_at_each_call(lambda: write(new), path.parent):
        found = content(path) if path.exists() else content(path.with_name(".out.old"))
        assert found in (old, new)
        assert path.exists() or not swap
        seen.append(found == new)
        write(old)
        assert [item.name for item in path.parent.iterdir()] == ["out"]  # what the killed one left is gone
    assert len(seen) > 8 and seen == sorted(seen) and seen[-1]


def test_a_file_in_the_making_by_a_living_process_is_left_alone(tmp_path: Path) -> None:
    of_parent = tmp_path / f".a.json.{os.getppid()}.tmp"
    of_parent.write_text("half")
    (tmp_path / ".a.json.999999999.tmp").write_text("of a process that is no more")
    write_json(tmp_path / "a.json", {})
    assert {item.name for item in tmp_path.iterdir()} == {"a.json", of_parent.name}


class Run:
    """The course of a training run as far as its files see it: a save after every step, steps 1 and 3 being best."""

    def __init__(self, out_dir: Path, resume: bool) -> None:
        arguments = TrainingArguments(checkpoint_dir=Path("base"), data_dir=Path("data"), out_dir=out_dir)
        arguments.resume = resume
        torch.manual_seed(1)
        self.model = torch.nn.Linear(8, 4)
        self.optimizer = Optimizer(self.model, 0.0, (0.9, 0.95))
        self.files = RunFiles(arguments, Fabric(accelerator="cpu", devices=1), self.model, self.save_adapter)
        if not resume:
            out_dir.mkdir()
            config = plain_arguments(arguments) | {"out_dir": "any"}
            (out_dir / "lit_config.yaml").write_text(yaml.safe_dump(config))
        self.state = self.files.resume(self.optimizer) if resume else RunState()
        self.files.tracker = Tracker("csv", out_dir, resume_step=self.state.step or None)

    def save_adapter(self, directory: Path) -> None:
        with atomic_path(directory / "adapter_model.safetensors") as temporary:
            save_file(self.model.state_dict(), temporary)
        write_json(directory / "adapter_config.json", {})

    def go_on(self, until: int) -> None:
        while self.state.step < until:
            for parameter in self.model.parameters():
                parameter.grad = torch.rand_like(parameter)  # so the random state is part of the course
            self.optimizer.step(0.1)
            self.state.step += 1
            self.files.tracker.log_metrics({"train_loss": 1.0}, self.state.step)
            self.files.tracker.log_metrics({"val_loss": 0.5}, self.state.step)
            self.files.tracker.log_probes([{"question": "?", "answer": str(self.state.step)}], self.state.step)
            if self.state.step in (1, 3):
                self.state.best_step, self.state.best_val_loss = self.state.step, 1.0 / self.state.step
            self.files.save(self.optimizer, self.state)


@pytest.mark.parametrize("first_step", [0, 2])
def test_a_save_killed_at_any_call_is_taken_up(
    first_step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # slow, and a kill takes nothing that the system has
    whole = Run(tmp_path / "whole", resume=False)
    whole.go_on(until=3)
    before, out_dir = tmp_path / "before", tmp_path / "out"
    Run(before, resume=False).go_on(until=first_step)
    steps = []

    def go_on() -> None:
        Run(out_dir, resume=True).go_on(until=first_step + 1)

    shutil.copytree(before, out_dir)
    for _ in killed_at_each_call(go_on, out_dir):
        for directory in (out_dir, out_dir / "best") if first_step else ():
            assert load_file(directory / "adapter_model.safetensors")["weight"].shape == (4, 8)
        resumed = Run(out_dir, resume=True)
        steps.append(resumed.state.step)
        assert [row["step"] for row in read_metrics(out_dir / "metrics.csv")] == [*range(1, steps[-1] + 1)]
        resumed.go_on(until=3)
        assert content(out_dir) == content(tmp_path / "whole")
        assert {item.name for item in (out_dir / "state").iterdir()} == {"state.json", "step-3.safetensors"}
        shutil.rmtree(out_dir)
        shutil.copytree(before, out_dir)
    assert set(steps) == {first_step, first_step + 1} and steps == sorted(steps) and len(steps) > 25


def test_a_torn_row_behind_the_saved_step_is_dropped(tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    Run(out_dir, resume=False).go_on(until=2)
    whole = (out_dir / "metrics.csv").read_bytes()
    (out_dir / "metrics.csv").write_bytes(whole + b"3,,,,1,\n,,7\n")
    Run(out_dir, resume=True)
    assert (out_dir / "metrics.csv").read_bytes() == whole


# --- damaged states


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("step-2.safetensors", lambda data: data[:-1], r"step-2.safetensors: damaged.*--overwrite true"),
        ("step-2.safetensors", lambda data: data[:-9] + b"\x01" + data[-8:], r"step-2.safetensors: damaged"),
        ("step-2.safetensors", lambda data: b"", r"step-2.safetensors: damaged"),
        ("state.json", lambda data: data[: len(data) // 2], r"state.json: not valid JSON.*--overwrite true"),
        ("state.json", lambda data: b"", r"state.json: not valid JSON"),
        ("state.json", lambda data: b"[]", r"state.json: not the state of a run"),
        ("state.json", lambda data: data.replace(b'"tokens"', b'"token"'), r"state.json: not the state of a run"),
        ("state.json", lambda data: data.replace(b'"step": 2', b'"step": 1'), r"step-1.safetensors: no such file"),
    ],
)
def test_a_damaged_state_is_refused_by_name_and_stays(
    name: str, change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    out_dir = tmp_path / "run"
    Run(out_dir, resume=False).go_on(until=2)
    damage(out_dir / "state" / name, change)
    before = content(out_dir)
    with pytest.raises(InputError, match=message) as error:
        Run(out_dir, resume=True)
    assert "\n" not in str(error.value)
    assert content(out_dir) == before


def test_what_a_removed_state_leaves_is_not_written_over(tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    Run(out_dir, resume=False).go_on(until=2)
    shutil.rmtree(out_dir / "state")
    with pytest.raises(InputError, match=r"state.json: no such file, but .*/adapter_.* exists"):
        Run(out_dir, resume=True)


# --- the script, killed at random


def run_pretraining(arguments: list[str], log: Path, fatal_call: tuple[int, Path] | None, file_limit: int) -> None:
    """The body of a forked process: `python pretrain/lora.py arguments`, its stderr in `log`."""
    torch.set_num_threads(1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    if fatal_call is not None:
        kill_before_call(*fatal_call)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [str(ROOT / "pretrain/lora.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


class Pretraining:
    """Runs of `pretrain/lora.py` with the same arguments into various directories."""

    def __init__(self, checkpoint_dir: Path, directory: Path) -> None:
        self.directory, tokenizer = directory, Tokenizer.from_checkpoint(checkpoint_dir)
        for name in ("domain", "general"):
            random = np.random.default_rng(len(name))
            with TokenStoreWriter(directory / name, tokenizer.vocab_size, tokenizer.sha256, "test") as writer:
                for number in range(16):
                    tokens = random.integers(3, 320, random.integers(5, 60))
                    writer.add("train" if number < 12 else "val", tokens, num_words=9, num_bytes=99)
        probes = directory / "probes.jsonl"
        probes.write_text('{"question": "What is the capital of Norway?", "answers": ["Oslo"]}\n')
        self.arguments = {
            "checkpoint_dir": checkpoint_dir, "data_dir": directory / "domain", "probe_file": probes,
            "replay.data_dir": directory / "general", "accelerator": "cpu", "lora.r": 4, "lora.dropout": 0.2,
            "train.max_steps": 8, "train.learning_rate": 1.0, "train.warmup_steps": 2, "train.sequence_length": 32,
            "train.micro_batch_size": 2, "train.global_batch_size": 4, "eval.interval": 2, "eval.probe_tokens": 4,
        }  # fmt: skip
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["lit_llama.training", "lit_llama.lora", "jsonargparse", "conftest"])

    def start(
        self, out_dir: Path, fatal_call: tuple[int, Path] | None = None, file_limit: int = 0, **changes: object
    ) -> BaseProcess:
        arguments = {**self.arguments, "out_dir": out_dir, **changes}
        words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        log = self.directory / "stderr.txt"
        process = self._processes.Process(target=run_pretraining, args=(words, log, fatal_call, file_limit))
        process.start()
        return process

    def run(self, out_dir: Path, **options: object) -> tuple[int, str]:
        """(exit status, stderr) of a run."""
        process = self.start(out_dir, **options)
        process.join(120)
        return process.exitcode, (self.directory / "stderr.txt").read_text()

    def kill_and_resume(self, number: int, whole: Path, calls: int, seconds: float) -> str:
        """Kill a run at a random moment, perhaps its resume too, and see that the last one ends as `whole` did.

        Args:
            calls: of a whole run, on names in its directory.
            seconds: of a whole run, from the writing of its arguments on.

        Returns:
            What was done.
        """
        random = np.random.default_rng(number)
        out_dir = self.directory / f"killed-{number}"
        history = []
        for _ in range(1 + int(random.integers(2))):
            resume = {"resume": "true"} if (out_dir / "lit_config.yaml").exists() else {}
            if number % 2:
                fatal_call = int(random.integers(calls))
                process = self.start(out_dir, (fatal_call, out_dir), **resume)
                history.append(f"before call {fatal_call}")
            else:
                config = out_dir / "lit_config.yaml"
                written = config.exists() and config.stat().st_mtime_ns
                process = self.start(out_dir, **resume)
                while process.is_alive() and (config.exists() and config.stat().st_mtime_ns) == written:
                    time.sleep(0.001)
                delay = random.uniform(0, seconds)
                time.sleep(delay)
                process.kill()
                history.append(f"after {delay:.2f} s")
            process.join(120)
            assert process.exitcode in (-signal.SIGKILL, 0), (self.directory / "stderr.txt").read_text()
            state = out_dir / "state/state.json"
            history.append(f"at step {json.loads(state.read_text())['step'] if state.exists() else 0}")
        resume = {"resume": "true"} if (out_dir / "lit_config.yaml").exists() else {}
        status, errors = self.run(out_dir, **resume)
        assert status == 0, f"{history}: {errors}"
        assert results(out_dir) == results(whole), history
        return " ".join(history)


def results(out_dir: Path) -> dict[str, object]:
    """All that a run leaves, without its times."""
    found: dict[str, object] = content(out_dir)
    for name in ("report.md", "lit_config.yaml"):
        del found[name]
    with open(out_dir / "metrics.csv") as file:
        found["metrics.csv"] = [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]
    for name in ("report.json", "state/state.json"):
        record = json.loads((out_dir / name).read_text())
        for key in ("arguments", "peak_memory_gb", "source", "training_seconds", "evaluation_seconds", *TIMINGS):
            record.pop(key, None)
        found[name] = record
    return found


@pytest.fixture(scope="module")
def pretraining(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Pretraining:
    return Pretraining(tiny_checkpoint, tmp_path_factory.mktemp("pretraining"))


@pytest.fixture(scope="module")
def whole(pretraining: Pretraining) -> tuple[Path, float]:
    """An undisturbed run and the seconds from the writing of its arguments to its end."""
    out_dir = pretraining.directory / "whole"
    status, errors = pretraining.run(out_dir)
    assert status == 0, errors
    start, end = ((out_dir / name).stat().st_mtime for name in ("lit_config.yaml", "report.md"))
    return out_dir, end - start


@pytest.fixture(scope="module")
def half(pretraining: Pretraining) -> Path:
    """A run killed when it had written the tensors of step 6 and not given them their name yet."""
    out_dir = pretraining.directory / "half"
    assert pretraining.run(out_dir, fatal_call=(0, out_dir / "state/.step-6"))[0] == -signal.SIGKILL
    assert json.loads((out_dir / "state/state.json").read_text())["step"] == 4
    return out_dir


CALLS = 165  # on names in the directory of a whole run of `Pretraining`, about


@pytest.mark.parametrize("number", range(4))
def test_a_killed_run_ends_as_an_undisturbed_one(
    number: int, pretraining: Pretraining, whole: tuple[Path, float]
) -> None:
    pretraining.kill_and_resume(number, whole[0], CALLS, whole[1])


@pytest.mark.parametrize("full_at", ["adapter_model.safetensors", "step-6.safetensors"])
def test_a_full_disk_is_one_line_and_costs_nothing(
    full_at: str, pretraining: Pretraining, whole: tuple[Path, float], half: Path
) -> None:
    out_dir = pretraining.directory / f"full-{full_at}"
    shutil.copytree(half, out_dir)
    before = content(out_dir / "state")
    size = next(whole[0].rglob(full_at.replace("step-6", "step-8"))).stat().st_size
    status, errors = pretraining.run(out_dir, file_limit=size // 2, resume="true")
    assert status == 1 and "Traceback" not in errors
    message = errors.splitlines()[-1]
    assert message.startswith("error:") and "the disk is full" in message and f"/{full_at}'" in message
    assert "--resume true" in message or "run again" in message
    after = content(out_dir / "state")
    assert after.items() <= before.items() and "step-4.safetensors" in after
    assert pretraining.run(out_dir, resume="true")[0] == 0
    assert results(out_dir) == results(whole[0])


def test_a_run_that_is_over_is_not_taken_further(pretraining: Pretraining) -> None:
    out_dir = pretraining.directory / "patience"
    assert pretraining.run(out_dir, **{"train.patience": 0})[0] == 0
    before = results(out_dir)
    assert before["report.json"]["status"] == "stopped early" and before["report.json"]["steps"] == 2
    (out_dir / "report.json").unlink()  # as if killed before it was written
    status, errors = pretraining.run(out_dir, resume="true", **{"train.patience": 0})
    assert status == 0 and "training is done already, after step 2" in errors
    assert results(out_dir) == before
