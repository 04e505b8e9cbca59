"""What a training run leaves in its directory, and how it goes on after a break.

out_dir/
  adapter files             what has been trained, as of the last evaluation (a full run: checkpoint/)
  best/                     the same at the lowest held-out loss
  state/                    everything an exact resume needs; no pickles
  lit_config.yaml           the arguments: pass it back with --config
  metrics.csv, probes.jsonl and the trackers' files (`tracking.py`)
  report.json, report.md    before and after (`report.py`)
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.fabric import Fabric
from safetensors.torch import load_file, save_file

from lit_llama.command_line import StatusLine, progress
from lit_llama.errors import InputError
from lit_llama.files import atomic_directory, atomic_file, read_json, refuse_overwrite
from lit_llama.optimizer import Optimizer
from lit_llama.report import write_report
from lit_llama.tracking import Tracker

if TYPE_CHECKING:
    from lit_llama.training import Corpus, TrainingArguments

# Arguments that may differ when a run is continued: they do not change what a step computes.
_FREE_ON_RESUME = (
    "resume", "overwrite", "out_dir", "eval", "tracker", "probe_file", "accelerator", "devices", "nodes", "strategy",
    "train.patience", "train.epochs", "train.max_steps", "train.micro_batch_size",
)  # fmt: skip


@dataclass
class RunState:
    """Where a run stands; with the optimizer's tensors and the random states this is all that a resume needs."""

    step: int = 0
    tokens: int = 0
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    best_val_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    first_metrics: dict[str, float] = field(default_factory=dict)
    """Measured before the first step: the base model."""
    last_metrics: dict[str, float] = field(default_factory=dict)


class RunFiles:
    """The run directory of one training run. Only the main process writes."""

    def __init__(self, arguments: "TrainingArguments", fabric: Fabric, save: Callable[[Path], None]) -> None:
        self.arguments, self.fabric, self._save = arguments, fabric, save
        self.out_dir = Path(arguments.out_dir)
        self.is_main = fabric.is_global_zero
        self.tracker: Tracker | None = None
        self._status = StatusLine()
        if self.is_main and not arguments.resume:
            refuse_overwrite(self.out_dir, arguments.overwrite)

    # --- beginning
    # -----------------------------------------------------------------------------------------------------

    def resume(self, optimizer: Optimizer) -> RunState:
        """Put parameters, optimizer and random states back as they were when the run stopped.

        Raises:
            InputError: there is nothing to resume, or an argument that changes the computation differs.
        """
        directory = self.out_dir / "state"
        if not (directory / "state.json").is_file():
            raise InputError(f"{self.out_dir} holds no run to resume (no state/state.json); start it without --resume")
        before = yaml.safe_load((self.out_dir / "lit_config.yaml").read_text(encoding="utf-8"))
        differing = _first_difference(before, plain_arguments(self.arguments))
        if differing:
            name, old, new = differing
            raise InputError(
                f"--{name} is {new!r} but was {old!r} in the run in {self.out_dir}; resume with the same arguments"
            )
        state = RunState(**read_json(directory / "state.json"))
        tensors = load_file(directory / "state.safetensors")
        optimizer.load_state_tensors(tensors)
        rank = self.fabric.global_rank
        if f"random.{rank}" in tensors:
            torch.set_rng_state(tensors[f"random.{rank}"])
        if f"random_cuda.{rank}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random_cuda.{rank}"], self.fabric.device)
        if self.is_main:
            progress(f"resuming {self.out_dir} after step {state.step}")
        return state

    def announce(self, optimizer: Optimizer, corpus: "Corpus", total_steps: int, state: RunState) -> None:
        """Open the trackers, keep the arguments, and tell the user what is about to happen."""
        if not self.is_main:
            return
        if self.arguments.overwrite and not self.arguments.resume:
            for name in ("state", "best"):
                shutil.rmtree(self.out_dir / name, ignore_errors=True)
        names = self.arguments.tracker
        self.tracker = Tracker(
            [names] if isinstance(names, str) else names,
            self.out_dir,
            resume_step=state.step if self.arguments.resume else None,
        )
        arguments = plain_arguments(self.arguments)
        with atomic_file(self.out_dir / "lit_config.yaml") as file:
            yaml.safe_dump(
                {k: v for k, v in arguments.items() if k not in ("resume", "overwrite")}, file, sort_keys=False
            )
        self.tracker.log_parameters(arguments)
        trained = sum(p.numel() for p in optimizer.parameters.values())
        windows, train = corpus.windows, self.arguments.train
        replay = f" ({windows.replay_windows} of them replay)" if windows.replay_windows else ""
        progress(
            f"{trained:,} parameters to train; {windows.windows_per_epoch} windows of {train.sequence_length} tokens an"
            f" epoch{replay}; {total_steps} steps of {train.global_batch_size} windows on"
            f" {self.fabric.world_size} x {self.fabric.device.type}"
        )

    # --- on the way
    # ----------------------------------------------------------------------------------------------------

    def record_step(self, metrics: dict[str, float], state: RunState, total_steps: int) -> None:
        """Metrics of one optimizer step: to the trackers and on the status line."""
        if not self.is_main:
            return
        self.tracker.log_metrics(metrics, state.step)
        left = (total_steps - state.step) * state.training_seconds / state.step
        self._status.show(
            f"step {state.step}/{total_steps}  epoch {metrics['epoch']:.2f}  loss {metrics['train_loss']:.3f}"
            f"  lr {metrics['learning_rate']:.1e}  {metrics['tokens_per_second']:,.0f} tokens/s"
            f"  mfu {metrics['mfu']:.0%}  {metrics['memory_gb']:.1f} GB  {_clock(left)} left",
            last=state.step == total_steps,
        )

    def record_evaluation(self, metrics: dict[str, float], answers: list[dict], state: RunState) -> None:
        """Metrics and probe answers of one evaluation."""
        if not self.is_main:
            return
        self.tracker.log_metrics(metrics, state.step)
        if answers:
            self.tracker.log_probes(answers, state.step)
        parts = [f"held-out loss {metrics['val_loss']:.3f} (perplexity {math.exp(metrics['val_loss']):.1f})"]
        if "general_loss" in metrics:
            parts.append(f"general {metrics['general_loss']:.3f} ({math.exp(metrics['general_loss']):.1f})")
        scored = [answer["correct"] for answer in answers if "correct" in answer]
        if scored:
            parts.append(f"probes {sum(scored)}/{len(scored)}")
        self._status.clear()
        progress(f"step {state.step}: {', '.join(parts)}")

    def save(self, optimizer: Optimizer, state: RunState, is_best: bool) -> None:
        """Keep what is trained so far and everything a resume needs, each replaced as a whole."""
        random = {f"random.{self.fabric.global_rank}": torch.get_rng_state()}
        if self.fabric.device.type == "cuda":
            random[f"random_cuda.{self.fabric.global_rank}"] = torch.cuda.get_rng_state(self.fabric.device)
        if self.fabric.world_size > 1:
            random = _merged(self.fabric, random)
        if self.is_main:
            self._save(self.out_dir)
            if is_best:
                self._save(self.out_dir / "best")
            with atomic_directory(self.out_dir / "state", overwrite=True) as directory:
                tensors = {name: tensor.cpu().contiguous() for name, tensor in optimizer.state_tensors().items()}
                save_file({**tensors, **random}, directory / "state.safetensors")
                (directory / "state.json").write_text(json.dumps(asdict(state), indent=2, allow_nan=False))
        self.fabric.barrier()

    # --- the end
    # -------------------------------------------------------------------------------------------------------

    def report(
        self, optimizer: Optimizer, corpus: "Corpus", state: RunState, status: str, total_parameters: int
    ) -> dict:
        """Write report.json and report.md; returns the former's content."""
        if not self.is_main:
            return {}
        facts = {
            "status": status,
            "steps": state.step,
            "epochs": state.step * self.arguments.train.global_batch_size / corpus.windows.windows_per_epoch,
            "tokens": state.tokens,
            "seconds": state.training_seconds + state.evaluation_seconds,
            "training_seconds": state.training_seconds,
            "tokens_per_second": state.tokens / state.training_seconds if state.training_seconds else None,
            "trainable_parameters": sum(p.numel() for p in optimizer.parameters.values()),
            "total_parameters": total_parameters,
            "best_step": state.best_step,
            "best_val_loss": state.best_val_loss,
            "before": state.first_metrics,
            "after": state.last_metrics,
            "arguments": plain_arguments(self.arguments),
        }
        report = write_report(self.out_dir, facts, self.fabric.device)
        progress(f"report: {self.out_dir / 'report.md'}")
        return report

    def finish(self, status: str) -> None:
        """Close the trackers; files of a finished run are handed to those that keep files."""
        if not self.is_main:
            return
        self._status.clear()
        if status == "finished":
            for pattern in ("adapter_*", "report.*", "lit_config.yaml"):
                for path in sorted(self.out_dir.glob(pattern)):
                    self.tracker.log_file(path)
        self.tracker.finish(status)


def plain_arguments(arguments: Any) -> dict[str, Any]:
    """A dataclass of arguments as nested plain values, as --config takes it."""
    if is_dataclass(arguments):
        return {item.name: plain_arguments(getattr(arguments, item.name)) for item in fields(arguments)}
    if isinstance(arguments, dict):
        return {key: plain_arguments(value) for key, value in arguments.items()}
    if isinstance(arguments, list | tuple):
        return [plain_arguments(value) for value in arguments]
    return str(arguments) if isinstance(arguments, Path) else arguments


def _first_difference(before: dict, now: dict, prefix: str = "") -> tuple[str, Any, Any] | None:
    """(name, before, now) of the first argument that differs and may not."""
    for key in sorted(before.keys() | now.keys()):
        name = prefix + key
        if name in _FREE_ON_RESUME:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found = _first_difference(old, new, f"{name}.")
            if found:
                return found
        elif old != new:
            return name, old, new
    return None


def _merged(fabric: Fabric, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The random states of all processes, by name with the rank."""
    merged = {}
    for name, tensor in own.items():
        stem = name.rpartition(".")[0]
        gathered = fabric.all_gather(tensor.to(fabric.device)).cpu()
        merged |= {f"{stem}.{rank}": gathered[rank].clone() for rank in range(fabric.world_size)}
    return merged


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
