"""The one place that talks to experiment trackers: local files, TensorBoard and Neptune as loggers of Lightning Fabric.

A `Tracker` owns a run's loggers and is what training calls. The local files (`metrics.csv`, `probes.jsonl`) are always
written and are enough to draw and compare runs; every other tracker is optional and may fail without harm to the run.
What is measured, and when, is decided in `training.py`; drawing is `scripts/plot_run.py`.
"""

import base64
import csv
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import os
import queue
import shlex
import threading
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lightning.fabric.loggers import Logger, TensorBoardLogger

from lit_llama.command_line import progress
from lit_llama.errors import InputError
from lit_llama.files import atomic_file, flush_to_disk
from lit_llama.hardware import run_environment

if TYPE_CHECKING:
    import neptune

METRICS = (
    "step", "epoch", "tokens", "learning_rate", "train_loss", "val_loss", "val_bits_per_byte", "general_loss",
    "probe_accuracy", "tokens_per_second", "mfu", "memory_gb", "gradient_norm", "seconds",
)  # fmt: skip
"""Columns that every metrics.csv has, in this order; further metrics get columns behind them as they appear."""


class Tracker:
    """All trackers of one run. Only the main process builds one.

    Args:
        names: one or several of "csv", "tensorboard", "neptune"; "csv" is implied.
        out_dir: the run directory.
        run_name: what TensorBoard and Neptune call the run; the name of `out_dir` when None.
        resume_step: where a resumed run continues; what was recorded after that step is dropped. None starts anew.
        project: Neptune's "workspace/project"; the variable NEPTUNE_PROJECT when None.

    Raises:
        InputError: an unknown name, or a tracker whose package is not installed.
    """

    def __init__(
        self,
        names: str | Sequence[str],
        out_dir: Path,
        run_name: str | None = None,
        resume_step: int | None = None,
        project: str | None = None,
    ) -> None:
        names = check_trackers(names)
        out_dir = Path(out_dir)
        self.loggers: list[Logger] = []
        if "tensorboard" in names:
            self.loggers.append(TensorBoardRun(out_dir, resume_step))
        if "neptune" in names:
            self.loggers.append(NeptuneRun(out_dir, run_name or out_dir.resolve().name, resume_step, project))
        # Made last, because it replaces what is there: a tracker that fails must not cost anyone the records of a run.
        self._local_files = LocalFiles(out_dir, resume_step)
        self.loggers.insert(0, self._local_files)

    def log_parameters(self, parameters: dict) -> None:
        """Record the run's configuration (a nested dict of plain values and Paths) and what it runs on."""
        self._each("log_hyperparams", {"parameters": parameters, **run_environment()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step. Several calls at one step add up to one row; steps never go back."""
        self._each("log_metrics", metrics=metrics, step=step)

    def log_probes(self, probes: list[dict], step: int) -> None:
        """Record the answers of one evaluation: rows of {question, answer, answers?, correct?}."""
        self._each("log_probes", probes, step)

    def flush(self) -> None:
        """Have the local files written to the disk, so that no later file outlives a power cut without them."""
        self._local_files.flush()

    def log_file(self, path: Path) -> None:
        """Hand a finished file (adapter, report) to the trackers that keep files."""
        self._each("log_file", Path(path))

    def finish(self, status: str) -> None:
        """Close everything; `status` is "finished", "interrupted" or "failed"."""
        self._each("finalize", status)

    def _each(self, method: str, *arguments: Any, **named: Any) -> None:
        """Call one method on every logger; one that fails is dropped with a warning, unless it is the local files."""
        for logger in list(self.loggers):
            try:
                getattr(logger, method)(*arguments, **named)
            except Exception as error:
                if isinstance(logger, LocalFiles):
                    raise
                # In place: Fabric holds the same list.
                self.loggers.remove(logger)
                progress(
                    f"warning: tracking with {logger.name} failed and is switched off, the run goes on with its local "
                    f"files ({_reason(error)})"
                )


def check_trackers(names: str | Sequence[str]) -> list[str]:
    """The names as a list; InputError for an unknown one and for one whose package is not installed."""
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in ("csv", "tensorboard", "neptune"):
            raise InputError(f"--tracker {name}: no such tracker; choose from csv, tensorboard, neptune")
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise InputError(f"--tracker {name} needs a package that is not installed: pip install {name}")
    return names


class LocalFiles(Logger):
    """`metrics.csv` (one row a step, a cell empty where nothing was measured) and `probes.jsonl` (one line an answer).

    Every row is with the system when the call returns, so a kill loses none, and both files can be read while they
    grow. A resumed run continues them: rows after its step are dropped, so no step occurs twice. The kill may have left
    the last of those in a jumble, so nothing behind that step is read.
    """

    name = "csv"
    version = None

    def __init__(self, out_dir: Path, resume_step: int | None) -> None:
        out_dir.mkdir(parents=True, exist_ok=True)
        self._metrics_path, self._probes_path = out_dir / "metrics.csv", out_dir / "probes.jsonl"
        metrics, probes = [], []
        if resume_step is not None and self._metrics_path.exists():
            metrics = read_metrics(self._metrics_path, resume_step)
        if resume_step is not None and self._probes_path.exists():
            probes = [row for row in read_probes(self._probes_path) if row["step"] <= resume_step]
        self._columns = list(METRICS)
        self._file: BinaryIO | None = None
        self._rewrite_metrics(metrics)
        self._rewrite_probes(probes)

    @property
    def log_dir(self) -> str:
        return str(self._metrics_path.parent)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        last = self._row.get("step", 0)
        step = last if step is None else step
        if step < last:
            raise ValueError(f"{self._metrics_path}: step {step} comes after step {last}")
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        row = (self._row if step == last else {}) | numbers | {"step": step}
        if set(row) - set(self._columns):
            self._rewrite_metrics([*(old for old in read_metrics(self._metrics_path) if old["step"] < step), row])
            return
        if step > last or not self._row:
            self._row_start = self._file.seek(0, os.SEEK_END)
        # A second call at one step writes over the row of the first.
        self._file.seek(self._row_start)
        self._file.write(self._line(row))
        self._file.truncate()
        self._file.flush()
        self._row = row

    def log_hyperparams(self, params: dict) -> None:
        """Nothing: the run directory holds `lit_config.yaml` and `report.json` already."""

    def log_probes(self, probes: list[dict], step: int) -> None:
        if step <= self._probe_step:
            self._rewrite_probes([row for row in read_probes(self._probes_path) if row["step"] < step])
        with open(self._probes_path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({**probe, "step": step}, ensure_ascii=False) + "\n" for probe in probes)
        self._probe_step = step

    def log_file(self, path: Path) -> None:
        """Nothing: the file lies in the run directory already."""

    def flush(self) -> None:
        flush_to_disk(self._metrics_path)
        if self._probes_path.exists():
            flush_to_disk(self._probes_path)

    def finalize(self, status: str) -> None:
        self._file.close()

    def _line(self, row: Mapping[str, float]) -> bytes:
        text = io.StringIO()
        values = [row.get(name, "") for name in self._columns]
        # Nine significant digits give back every float32 exactly; integers (tokens) stay integers.
        csv.writer(text, lineterminator="\n").writerow([f"{v:.9g}" if isinstance(v, float) else v for v in values])
        return text.getvalue().encode()

    def _rewrite_metrics(self, rows: list[dict[str, float]]) -> None:
        self._columns = list(dict.fromkeys([*self._columns, *(name for row in rows for name in row)]))
        with atomic_file(self._metrics_path, "wb") as file:
            file.write(self._line({name: name for name in self._columns}))
            self._row_start = file.tell()
            for row in rows:
                self._row_start = file.tell()
                file.write(self._line(row))
        self._row = rows[-1] if rows else {}
        if self._file is not None:
            self._file.close()
        self._file = open(self._metrics_path, "r+b")

    def _rewrite_probes(self, rows: list[dict]) -> None:
        if rows:
            with atomic_file(self._probes_path) as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            self._probes_path.unlink(missing_ok=True)
        self._probe_step = max((row["step"] for row in rows), default=-1)


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, float]]:
    """Rows of a metrics.csv, possibly of a running or killed run: its unfinished last line is left out.

    Args:
        last_step: Read no further than the row of this step.

    Returns:
        One dict a row: "step" and whatever was measured there; a column without a value in that row is absent.

    Raises:
        InputError: no such file, or not a metrics.csv.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    lines = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))
    columns = next(lines, [])
    if "step" not in columns:
        raise InputError(f"{path}: not a metrics.csv (its first line names no column 'step')")
    rows = []
    for cells in lines:
        try:
            row = {name: _number(cell) for name, cell in zip(columns, cells, strict=True) if cell}
            row["step"] = int(row["step"])
        except (ValueError, KeyError):
            raise InputError(f"{path}, line {lines.line_num}: expected {len(columns)} numbers, found {cells}") from None
        if last_step is not None and row["step"] > last_step:
            break
        rows.append(row)
        if row["step"] == last_step:
            break
    return rows


def read_probes(path: Path) -> list[dict]:
    """Rows {question, answer, step, ...} of a probes.jsonl; the unfinished last line of a killed run is left out.

    Raises:
        InputError: a line that is not a JSON object with a step.
    """
    rows = []
    text = Path(path).read_text(encoding="utf-8")
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number}: expected a JSON object with a step") from None
        rows.append(row)
    return rows


class TensorBoardRun(TensorBoardLogger):
    """TensorBoard event files in `out_dir/tensorboard`: scalars, parameters, probe answers and the report as text."""

    def __init__(self, out_dir: Path, resume_step: int | None) -> None:
        # Events of an earlier run from this step on are marked as void, so a resumed curve has one value a step.
        purge_step = 0 if resume_step is None else resume_step + 1
        super().__init__(out_dir / "tensorboard", name="", version="", purge_step=purge_step, flush_secs=10)

    @property
    def name(self) -> str:
        return "tensorboard"

    @property
    def log_dir(self) -> str:
        return self.root_dir

    def log_hyperparams(self, params: dict) -> None:
        from torch.utils.tensorboard.summary import hparams

        for title, values in params.items():
            self.experiment.add_text(
                title, f"```json\n{json.dumps(values, indent=2, default=str, ensure_ascii=False)}\n```", 0
            )
        # The HPARAMS tab compares runs by the metrics named here; their values come from the scalars of the same name.
        flat = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in _leaves(params)}
        for summary in hparams(flat, {"val_loss": math.nan, "probe_accuracy": math.nan}):
            self.experiment._get_file_writer().add_summary(summary)

    def log_probes(self, probes: list[dict], step: int) -> None:
        lines = ["| question | answer | correct |", "| --- | --- | --- |"]
        for probe in probes:
            cells = (probe["question"], probe["answer"], probe.get("correct", ""))
            lines.append("| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |")
        self.experiment.add_text("probes", "\n".join(lines), step)

    def log_file(self, path: Path) -> None:
        if path.suffix == ".md":
            self.experiment.add_text(path.stem, path.read_text(encoding="utf-8"), 0)


class NeptuneRun(Logger):
    """A Neptune run: on a server when a token and a project are given and it answers, otherwise recorded offline.

    Offline data and what a lost connection left unsent lie in `out_dir/neptune`; `neptune sync` sends them later. Files
    are recorded as paths, so they are read from the run directory at that time.

    Args:
        project: "workspace/project"; NEPTUNE_PROJECT when None.
        connect_seconds: how long the start of the run may wait for the server.
        stop_seconds: how long its end may wait for what is still unsent.
    """

    name = "neptune"
    version = None

    def __init__(
        self,
        out_dir: Path,
        run_name: str,
        resume_step: int | None,
        project: str | None,
        connect_seconds: float = 10.0,
        stop_seconds: float = 30.0,
    ) -> None:
        import neptune
        from neptune.types import GitRef

        # The client logs to stdout, where only results belong; without its handlers warnings reach stderr.
        self._client_log = logging.getLogger("neptune")
        self._client_log.handlers.clear()
        self._client_log.propagate = True
        self._client_log.setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", message=".*NVML Shared Library Not Found")  # no GPU: nothing to warn of

        self._out_dir, self._directory, self._stop_seconds = out_dir, out_dir / "neptune", stop_seconds
        self._directory.mkdir(parents=True, exist_ok=True)
        # The client knows no argument for this, and `neptune sync --path` wants a folder named .neptune inside.
        os.environ["NEPTUNE_DATA_DIRECTORY"] = str(self._directory.resolve() / ".neptune")
        # The same identifier makes a resumed run continue its run on the server.
        identifier = self._directory / "run_id"
        if resume_step is None or not identifier.exists():
            with atomic_file(identifier) as file:
                file.write(uuid.uuid4().hex)
        options = {
            "name": run_name,
            "custom_run_id": identifier.read_text(),
            "git_ref": GitRef(repository_path=Path(__file__).parent),
            "capture_stdout": False,
            "capture_stderr": False,
        }
        token, self._project = os.environ.get("NEPTUNE_API_TOKEN"), project or os.environ.get("NEPTUNE_PROJECT")
        self._run: neptune.Run | None = None
        if token and self._project and os.environ.get("NEPTUNE_MODE") != "offline":
            try:
                self._run = _connect(token, connect_seconds, {**options, "project": self._project})
            except Exception as error:  # the client and its HTTP stack raise dozens of unrelated types
                progress(f"warning: no connection to Neptune ({_reason(error)}); the run is recorded offline instead")
        self._offline = self._run is None
        if self._offline:
            self._run = neptune.init_run(mode="offline", **options)
            self._say_where("recorded offline")
        else:
            self._client_log.setLevel(logging.WARNING)
            progress(f"neptune: {self._run.get_url()}")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for metric, value in metrics.items():
            if math.isfinite(value):  # the client refuses the others
                self._run[f"training/{metric}"].append(float(value), step=step)

    def log_hyperparams(self, params: dict) -> None:
        for name, value in _leaves(params):
            self._run[name] = value if isinstance(value, bool | int | float) else str(value)

    def log_probes(self, probes: list[dict], step: int) -> None:
        for index, probe in enumerate(probes):
            series = self._run[f"probes/{index:03d}"]
            series["question"] = probe["question"]
            # A text series of Neptune holds 1,000 characters a value; the table has the whole answer.
            series["answer"].append(probe["answer"][:1000], step=step)
            if probe.get("correct") is not None:
                series["correct"].append(float(probe["correct"]), step=step)
        table = self._directory / "probes.csv"
        _write_probe_table(read_probes(self._out_dir / "probes.jsonl"), table)
        self._run["probes/table"].upload(str(table))
        self._run.wait(disk_only=True)  # so that a killed run keeps everything up to its last evaluation

    def log_file(self, path: Path) -> None:
        path, out_dir = path.resolve(), self._out_dir.resolve()
        name = path.relative_to(out_dir) if path.is_relative_to(out_dir) else path.name
        self._run[f"files/{name}"].upload(str(path))

    def finalize(self, status: str) -> None:
        if self._run.get_state() == "stopped":
            return
        self._run["status"] = status
        self._run["sys/failed"] = status == "failed"
        self._client_log.setLevel(logging.CRITICAL)  # what it says about unsent data is said below
        self._run.stop(seconds=self._stop_seconds)
        if self._offline:
            self._say_where("recorded offline")
        elif any((self._directory / ".neptune" / "async").glob("*/data-*.log")):
            self._say_where("not everything could be sent; the rest is")

    def _say_where(self, what: str) -> None:
        project = self._project or "WORKSPACE/PROJECT"
        progress(
            f"neptune: {what} in {self._directory}; to send it to a server, set NEPTUNE_API_TOKEN and run\n"
            f"  neptune sync --path {shlex.quote(str(self._directory))} --project {shlex.quote(project)}"
        )


def _connect(token: str, seconds: float, options: dict[str, Any]) -> "neptune.Run":
    """Start a run on the server that the token names, or raise within `seconds`.

    The client alone tries a refused connection for a minute and a server that never answers for ten, and cannot be told
    otherwise, so it works in a thread that is left behind when the time is over.
    """
    import neptune
    import requests

    outcome: queue.Queue[neptune.Run | Exception] = queue.Queue()
    given_up = threading.Event()

    def attempt() -> None:
        try:
            try:
                content = json.loads(base64.b64decode(token))
                address = content.get("api_url") or content["api_address"]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError("NEPTUNE_API_TOKEN is not a token of Neptune") from None
            insecure = os.environ.get("NEPTUNE_ALLOW_SELF_SIGNED_CERTIFICATE")
            address = address if "://" in address else f"https://{address}"
            requests.head(address, timeout=seconds, verify=not insecure)  # the client would try for a minute
            run = neptune.init_run(api_token=token, mode="async", **options)
        except Exception as error:
            outcome.put(error)
        else:
            if given_up.is_set():
                run.stop(seconds=0)
            outcome.put(run)

    threading.Thread(target=attempt, daemon=True).start()
    try:
        result = outcome.get(timeout=seconds)
    except queue.Empty:
        given_up.set()
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if isinstance(result, Exception):
        raise result
    return result


def _write_probe_table(probes: list[dict], path: Path) -> None:
    """One row a question and one column a step, as people compare answers."""
    steps = sorted({probe["step"] for probe in probes})
    rows: dict[str, dict[str, str]] = {}
    for probe in probes:
        row = rows.setdefault(probe["question"], {"question": probe["question"]})
        row["expected"] = " / ".join(probe.get("answers", []))
        row[f"step {probe['step']}"] = probe["answer"]
    with atomic_file(path) as file:
        writer = csv.DictWriter(
            file, ["question", "expected", *(f"step {step}" for step in steps)], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows.values())


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """("parameters/train/learning_rate", 2e-4), ... of a nested dict, in order."""
    leaves = []
    for name, value in tree.items():
        leaves += _leaves(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return leaves


def _number(cell: str) -> int | float:
    return int(cell) if cell.lstrip("-").isdigit() else float(cell)


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


def _reason(error: Exception) -> str:
    """The kind of error and, where it is a sentence and not one of the client's pages of coloured text, the message."""
    message = _one_line(error)
    return type(error).__name__ if len(message) > 100 or not message else f"{type(error).__name__}: {message}"
