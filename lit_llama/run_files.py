"""What a training run leaves in its directory, and how it goes on after a break.

out_dir/
  lit_config.yaml           the arguments: pass it back with --config
  metrics.csv, probes.jsonl and the trackers' files (`tracking.py`)
  state/state.json          where the run stands, and the checksum of the file with its tensors
  state/step-N.safetensors  these tensors: parameters, optimizer, random states
  adapter files             what has been trained, as of the last state (a full run: checkpoint/)
  best/                     the same at the lowest held-out loss
  report.json, report.md    before and after (`report.py`)

A run may be killed at any moment. What it has done counts from the instant in which the new state.json takes the old
one's name: everything written before that (metrics, probes, tensors under a new name) is dropped by a resume from the
old state, and everything written after it (adapter, best) is written again by a resume from the new one. A run killed
before its first state starts from the beginning.
"""

import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import nn

from lit_llama.command_line import StatusLine, progress
from lit_llama.errors import InputError, RunError
from lit_llama.files import atomic_file, atomic_path, is_disk_full, read_json, refuse_overwrite, write_json
from lit_llama.optimizer import Optimizer
from lit_llama.parallel import full_tensor, sliced_like, whole_parameters
from lit_llama.report import write_report
from lit_llama.tracking import Tracker, check_trackers

if TYPE_CHECKING:
    from lit_llama.training import Corpus, RunArguments

# What a run has no part of before its first state.
_RESULTS = ("adapter_*", "checkpoint", "best", "report.*")

_RESTORE = "restore it from a copy, or start again with --overwrite true"

# Arguments that may differ when a run is continued: they do not change what a step computes.
_FREE_ON_RESUME = (
    "resume", "overwrite", "out_dir", "eval", "tracker", "probe_file", "accelerator", "devices", "nodes", "strategy",
    "train.patience", "train.epochs", "train.max_steps", "train.micro_batch_size", "train.compile", "activations",
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

    def __init__(
        self, arguments: "RunArguments", fabric: Fabric, model: nn.Module, save: Callable[[Path], None]
    ) -> None:
        self.arguments, self.fabric, self.model, self._save = arguments, fabric, model, save
        self.out_dir = Path(arguments.out_dir)
        self.is_main = fabric.is_global_zero
        self.tracker: Tracker | None = None
        self._status = StatusLine()
        self._saved_step: int | None = None
        check_trackers(arguments.tracker)
        if not arguments.resume:
            refuse_overwrite(self.out_dir, arguments.overwrite)
            fabric.barrier()  # before the main process writes there

    # --- beginning
    # -----------------------------------------------------------------------------------------------------

    def resume(self, optimizer: Optimizer) -> RunState:
        """Put parameters, optimizer and random states back as they were when the run stopped.

        Raises:
            InputError: there is nothing to resume, an argument that changes the computation differs, or a file of the
                state is damaged.
        """
        self._refuse_other_arguments()
        state_file = self.out_dir / "state/state.json"
        if not state_file.is_file():
            # A run has none of these before its first state, so the state has been removed, not left out by a kill.
            results = [path for pattern in _RESULTS for path in self.out_dir.glob(pattern)]
            if results:
                raise InputError(f"{state_file}: no such file, but {results[0]} exists; {_RESTORE}")
            if self.is_main:
                progress(f"{self.out_dir} was stopped before its first state was saved: starting from the beginning")
            return RunState()
        state, checksum = _read_state(state_file)
        tensors_file = self._tensors_file(state)
        if not tensors_file.is_file():
            raise InputError(f"{tensors_file}: no such file; {_RESTORE}")
        if _checksum(tensors_file) != checksum:
            raise InputError(f"{tensors_file}: damaged, its checksum is not that of state.json; {_RESTORE}")
        tensors = load_file(tensors_file)
        for name, parameter in optimizer.parameters.items():
            stored = tensors.get(f"parameter.{name}")
            if stored is None or stored.shape != parameter.shape:
                raise InputError(
                    f"{tensors_file}: {name} is {'missing' if stored is None else tuple(stored.shape)}, the model's is"
                    f" {tuple(parameter.shape)}; resume with the base that was trained"
                )
        optimizer.load_state_tensors(_sliced(tensors, optimizer))
        rank = self.fabric.global_rank
        if f"random.{rank}" in tensors:
            torch.set_rng_state(tensors[f"random.{rank}"])
        if f"random_cuda.{rank}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random_cuda.{rank}"], self.fabric.device)
        if self.is_main:
            progress(f"resuming {self.out_dir} after step {state.step}")
        self._saved_step = state.step
        self._publish(state)
        return state

    def _refuse_other_arguments(self) -> None:
        path = self.out_dir / "lit_config.yaml"
        if not path.is_file():
            raise InputError(f"{self.out_dir} holds no run to resume (no lit_config.yaml); start it without --resume")
        try:
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid YAML ({error}); {_RESTORE}") from None
        if not isinstance(before, dict):
            raise InputError(f"{path}: not the arguments of a run; {_RESTORE}")
        differing = _first_difference(before, plain_arguments(self.arguments))
        if differing:
            name, old, new = differing
            raise InputError(
                f"--{name} is {new!r} but was {old!r} in the run in {self.out_dir}; resume with the same arguments"
            )

    def announce(self, optimizer: Optimizer, corpus: "Corpus", total_steps: int, state: RunState) -> None:
        """Open the trackers, keep the arguments, and tell the user what is about to happen."""
        if not self.is_main:
            return
        if self.arguments.overwrite and not self.arguments.resume:
            self._remove_results()
        arguments = plain_arguments(self.arguments)
        with atomic_file(self.out_dir / "lit_config.yaml") as file:
            yaml.safe_dump(
                {k: v for k, v in arguments.items() if k not in ("resume", "overwrite")}, file, sort_keys=False
            )
        self.tracker = Tracker(self.arguments.tracker, self.out_dir, resume_step=state.step or None)
        self.tracker.log_parameters(arguments)
        trained = sum(p.numel() for p in optimizer.parameters.values())
        windows, train = corpus.windows, self.arguments.train
        replay = f" ({windows.replay_windows} of them replay)" if windows.replay_windows else ""
        progress(
            f"{trained:,} parameters to train; {windows.windows_per_epoch} windows of {train.sequence_length} tokens an"
            f" epoch{replay}; {total_steps} steps of {train.global_batch_size} windows on"
            f" {self.fabric.world_size} x {self.fabric.device.type}"
        )

    def _remove_results(self) -> None:
        """Remove an older run; its state first, so that a kill in between leaves nothing that a resume would take."""
        (self.out_dir / "state/state.json").unlink(missing_ok=True)
        for path in [path for pattern in ("state", *_RESULTS) for path in self.out_dir.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

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
        if "val_accuracy" in metrics:
            parts.append(f"accuracy {metrics['val_accuracy']:.1%}")
        scored = [answer["correct"] for answer in answers if "correct" in answer]
        if scored:
            parts.append(f"probes {sum(scored)}/{len(scored)}")
        self._status.clear()
        progress(f"step {state.step}: {', '.join(parts)}")

    def save(self, optimizer: Optimizer, state: RunState) -> None:
        """Keep everything a resume needs and what is trained so far; see above for the order."""
        if state.step == self._saved_step:
            return
        random = {f"random.{self.fabric.global_rank}": torch.get_rng_state()}
        if self.fabric.device.type == "cuda":
            random[f"random_cuda.{self.fabric.global_rank}"] = torch.cuda.get_rng_state(self.fabric.device)
        if self.fabric.world_size > 1:
            random = _merged(self.fabric, random)
        tensors = {}
        for name, tensor in optimizer.state_tensors().items():
            whole = full_tensor(tensor)
            if self.is_main:
                tensors[name] = whole.cpu().contiguous()
        if self.is_main:
            self.tracker.flush()
            tensors_file = self._tensors_file(state)
            with atomic_path(tensors_file) as temporary:
                save_file({**tensors, **random}, temporary)
            record = {**asdict(state), "checksum": _checksum(tensors_file)}
            write_json(tensors_file.with_name("state.json"), record)
        self._saved_step = state.step
        self._publish(state)
        self.fabric.barrier()

    def _tensors_file(self, state: RunState) -> Path:
        return self.out_dir / f"state/step-{state.step}.safetensors"

    def _publish(self, state: RunState) -> None:
        """Write what the saved state makes of the adapter and of best/, drop what it replaces; twice does no harm."""
        if self.is_main:
            for path in (self.out_dir / "state").iterdir():
                if path.name not in ("state.json", self._tensors_file(state).name):
                    path.unlink()
        with whole_parameters(self.model, keep=self.is_main):
            if self.is_main:
                self._save(self.out_dir)
                if state.best_step == state.step:
                    self._save(self.out_dir / "best")

    @contextmanager
    def full_disk_explained(self) -> Iterator[None]:
        """Turn the failure to write into one line that says how to go on."""
        try:
            yield
        except Exception as error:
            if not is_disk_full(error):
                raise
            kept = "no step was saved yet" if self._saved_step is None else f"step {self._saved_step} is kept"
            raise RunError(
                f"{self.out_dir}: the disk is full ({error}); {kept}: free some space and go on with the same command"
                " and --resume true"
            ) from None

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


def _read_state(path: Path) -> tuple[RunState, int]:
    """Where a run stands, and the checksum of the file with its tensors."""
    try:
        record = read_json(path)
        checksum = record.pop("checksum")
        return RunState(**record), checksum
    except (AttributeError, KeyError, TypeError):
        raise InputError(f"{path}: not the state of a run; {_RESTORE}") from None
    except InputError as error:
        raise InputError(f"{error}; {_RESTORE}") from None


def _checksum(path: Path) -> int:
    """CRC-32 of a file's content: finds what a truncated copy or a failing disk does to it."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


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


def _sliced(tensors: dict[str, torch.Tensor], optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """The tensors of a state, each sliced over the processes as the parameter that it belongs to."""
    parameters = {key: optimizer.masters.get(key.partition(".")[2]) for key in tensors}
    return {
        key: tensor if parameters[key] is None else sliced_like(tensor, parameters[key])
        for key, tensor in tensors.items()
    }


def _merged(fabric: Fabric, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The random states of all processes, by name with the rank."""
    merged = {}
    for name, tensor in own.items():
        stem = name.rpartition(".")[0]
        tensor = tensor.to(fabric.device)
        gathered = [torch.empty_like(tensor) for _ in range(fabric.world_size)]
        torch.distributed.all_gather(gathered, tensor)
        merged |= {f"{stem}.{rank}": state.cpu() for rank, state in enumerate(gathered)}
    return merged


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
