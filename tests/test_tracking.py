"""Trackers against what their own readers find: TensorBoard's EventAccumulator, Neptune's client and `neptune sync`."""

import csv
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from neptune_server import NeptuneServer, make_token

from lit_llama.errors import InputError
from lit_llama.tracking import METRICS, NeptuneRun, Tracker, read_metrics, read_probes

ROOT = Path(__file__).parent.parent
PROBES = [
    {"question": "What is Norway's code?", "answer": "It is .no", "answers": [".no", "no"], "correct": True},
    {"question": "Who | what?", "answer": "Two\nlines"},
]


@pytest.fixture(autouse=True)
def neptune_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token, no project; the stand-in server speaks HTTP; what the tracker sets is undone."""
    for name in ("NEPTUNE_API_TOKEN", "NEPTUNE_PROJECT", "NEPTUNE_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NEPTUNE_DATA_DIRECTORY", "")
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- local files ---


def test_metrics_file_has_one_row_a_step_and_is_complete_after_every_call(tmp_path: Path) -> None:
    tracker = Tracker([], tmp_path)
    loss = np.float32(2.718281828)
    tracker.log_metrics({"val_loss": 3.5}, step=0)
    tracker.log_metrics({"train_loss": torch.tensor(loss), "tokens": 2**40 + 1}, step=1)
    tracker.log_metrics({"val_loss": math.nan, "tokens": 2**40 + 2}, step=1)
    rows = rows_of(tmp_path / "metrics.csv")  # the tracker is still open
    assert tuple(rows[0]) == METRICS
    assert [row["step"] for row in rows] == ["0", "1"]
    assert (rows[0]["val_loss"], rows[0]["train_loss"]) == ("3.5", "")
    assert np.float32(rows[1]["train_loss"]) == loss
    assert (rows[1]["tokens"], rows[1]["val_loss"]) == (str(2**40 + 2), "nan")
    with pytest.raises(ValueError, match="step 0 comes after step 1"):
        tracker.log_metrics({"val_loss": 1.0}, step=0)


def test_new_metrics_get_columns_and_keep_the_rows_before(tmp_path: Path) -> None:
    tracker = Tracker("csv", tmp_path)
    tracker.log_metrics({"train_loss": 2.0}, step=1)
    tracker.log_metrics({"train_loss": 1.5}, step=2)
    tracker.log_metrics({"router_entropy": 0.25}, step=2)
    tracker.log_metrics({"router_entropy": 0.5, "train_loss": 1.25}, step=3)
    tracker.finish("finished")
    rows = rows_of(tmp_path / "metrics.csv")
    assert tuple(rows[0]) == (*METRICS, "router_entropy")
    assert [(r["step"], r["train_loss"], r["router_entropy"]) for r in rows] == [
        ("1", "2", ""),
        ("2", "1.5", "0.25"),
        ("3", "1.25", "0.5"),
    ]


def test_resumed_run_continues_the_files_without_what_came_after_its_step(tmp_path: Path) -> None:
    first = Tracker("csv", tmp_path)
    for step in range(1, 8):
        first.log_metrics({"train_loss": 8.0 - step, "extra": float(step)}, step)
        first.log_probes(PROBES, step)
    # The process was killed while it wrote.
    for name in ("metrics.csv", "probes.jsonl"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-7])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [1, 2, 3, 4, 5, 6]

    second = Tracker("csv", tmp_path, resume_step=4)
    second.log_metrics({"train_loss": 0.5}, 5)
    second.log_probes(PROBES[:1], 5)
    second.log_probes(PROBES, 5)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row["step"], row["train_loss"]) for row in rows] == [(1, 7), (2, 6), (3, 5), (4, 4), (5, 0.5)]
    assert rows[3]["extra"] == 4 and "extra" not in rows[4]
    probes = read_probes(tmp_path / "probes.jsonl")
    assert [probe["step"] for probe in probes] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert probes[-2:] == [{**probe, "step": 5} for probe in PROBES]

    Tracker("csv", tmp_path)  # no resume_step: a new run
    assert rows_of(tmp_path / "metrics.csv") == [] and not (tmp_path / "probes.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("loss\n1\n", "no column 'step'"), ("step,loss\n1,2\n2\n", "line 3"), ("step,loss\n1,abc\n", "line 2")],
)
def test_a_broken_metrics_file_is_named_with_its_line(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(InputError, match=f"metrics.csv.*{complaint}"):
        read_metrics(tmp_path / "metrics.csv")


def test_a_full_disk_under_metrics_csv_is_an_error(tmp_path: Path) -> None:
    tracker = Tracker("csv", tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, tracker.loggers[0]._file.fileno())
    with pytest.raises(OSError, match="No space left"):
        tracker.log_metrics({"train_loss": 1.0}, 1)


def test_loggers_serve_fabric(tmp_path: Path) -> None:
    tracker = Tracker(["csv", "tensorboard"], tmp_path)
    fabric = Fabric(accelerator="cpu", devices=1, loggers=tracker.loggers)
    fabric.log_dict({"train_loss": torch.tensor(1.5)}, step=3)
    tracker.finish("finished")
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 3, "train_loss": 1.5}]
    assert read_events(tmp_path).Scalars("train_loss")[0].value == 1.5


def test_unknown_trackers_and_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="wandb.*csv, tensorboard, neptune"):
        Tracker(["csv", "wandb"], tmp_path)
    Tracker("csv", tmp_path).log_metrics({"train_loss": 1.0}, 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install neptune"):
        Tracker("neptune", tmp_path)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    with pytest.raises(InputError, match="pip install tensorboard"):
        Tracker("tensorboard", tmp_path)
    assert len(read_metrics(tmp_path / "metrics.csv")) == 1  # nothing lost by a start that failed


# --- TensorBoard ---


def read_events(out_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(out_dir / "tensorboard")).Reload()


def test_tensorboard_shows_curves_parameters_probes_and_the_report(tmp_path: Path) -> None:
    tracker = Tracker("tensorboard", tmp_path)
    tracker.log_parameters({"train": {"learning_rate": 2e-4, "targets": ["q_proj"]}, "data_dir": Path("data/x")})
    for step in range(5):
        tracker.log_metrics({"train_loss": 5.0 - step}, step)
    tracker.log_probes(PROBES, 4)
    (tmp_path / "report.md").write_text("# Report\n")
    tracker.log_file(tmp_path / "report.md")
    tracker.finish("finished")

    events = read_events(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(s, 5.0 - s) for s in range(5)]

    def text(tag: str) -> str:
        return events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()

    assert '"learning_rate": 0.0002' in text("parameters") and '"data_dir": "data/x"' in text("parameters")
    assert "| Who \\| what? | Two lines |  |" in text("probes") and "| It is .no | True |" in text("probes")
    assert text("report") == "# Report\n"
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"parameters/train/learning_rate" in hparams


def test_a_resumed_tensorboard_curve_has_one_value_a_step(tmp_path: Path) -> None:
    for resume_step, steps in ((None, range(1, 8)), (4, range(5, 7))):
        tracker = Tracker("tensorboard", tmp_path, resume_step=resume_step)
        for step in steps:
            tracker.log_metrics({"train_loss": float(step if resume_step is None else -step)}, step)
        tracker.finish("finished")
    assert [event.value for event in read_events(tmp_path).Scalars("train_loss")] == [1, 2, 3, 4, -5, -6]


# --- Neptune ---


def log_a_run(tracker: Tracker, out_dir: Path) -> None:
    tracker.log_parameters({"lora": {"r": 16, "targets": ["q_proj"]}, "data_dir": Path("data/x"), "bf16": True})
    for step in range(1, 4):
        tracker.log_metrics({"train_loss": 3.0 / step, "learning_rate": 1e-4, "val_loss": math.nan}, step)
    tracker.log_probes(PROBES, 1)
    tracker.log_probes([{**PROBES[0], "answer": ".no"}, PROBES[1]], 3)
    (out_dir / "adapter_model.safetensors").write_bytes(b"weights")
    (out_dir / "report.md").write_text("# Report\n")
    tracker.log_file(out_dir / "adapter_model.safetensors")
    tracker.log_file(out_dir / "report.md")
    tracker.finish("finished")


def check_server_has_the_run(server: NeptuneServer) -> None:
    values: dict[str, object] = {}
    for operation in server.operations:
        path = operation.pop("path")
        ((kind, content),) = operation.items()
        if kind in ("logFloats", "logStrings"):
            values.setdefault(path, []).extend((entry["step"], entry["value"]) for entry in content["entries"])
        elif kind.startswith("assign"):
            values[path] = content["value"]
    assert values["training/train_loss"] == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert values["training/learning_rate"] == [(1, 1e-4), (2, 1e-4), (3, 1e-4)]
    assert "training/val_loss" not in values
    assert (values["parameters/lora/r"], values["parameters/bf16"]) == (16, True)
    assert (values["parameters/lora/targets"], values["parameters/data_dir"]) == ("['q_proj']", "data/x")
    assert values["versions/torch"] == torch.__version__ and "python" in values["source/command"]
    assert values["source/git_revision"] and values["hardware/cpu"]
    assert values["probes/000/question"] == PROBES[0]["question"]
    assert values["probes/000/answer"] == [(1, "It is .no"), (3, ".no")] and values["probes/000/correct"] == [
        (1, 1),
        (3, 1),
    ]
    assert (values["status"], values["sys/failed"]) == ("finished", False)
    assert server.files["files/adapter_model.safetensors"] == b"weights"
    assert server.files["files/report.md"] == b"# Report\n"
    table = list(csv.DictReader(server.files["probes/table"].decode().splitlines()))
    assert table[0] == {
        "question": PROBES[0]["question"],
        "expected": ".no / no",
        "step 1": "It is .no",
        "step 3": ".no",
    }


def test_without_a_token_neptune_records_offline_and_its_own_command_sends_it(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    log_a_run(Tracker("neptune", tmp_path, run_name="demo"), tmp_path)
    output = capfd.readouterr()
    assert output.out == ""
    command = f"neptune sync --path {tmp_path / 'neptune'} --project WORKSPACE/PROJECT"
    assert output.err.count(command) == 2 and "warn" not in output.err.lower()

    with NeptuneServer() as server:
        command = command.replace("WORKSPACE/PROJECT", "team/llama").split()[1:]
        program = Path(sys.executable).parent / "neptune"
        environment = {**os.environ, "NEPTUNE_API_TOKEN": server.token}
        sync = subprocess.run([program, *command], env=environment, capture_output=True, text=True, timeout=60)
        assert sync.returncode == 0, sync.stdout + sync.stderr
        check_server_has_the_run(server)


def test_with_a_token_neptune_sends_to_the_server_and_a_resumed_run_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    with NeptuneServer() as server:
        monkeypatch.setenv("NEPTUNE_API_TOKEN", server.token)
        log_a_run(Tracker("neptune", tmp_path, project="team/llama"), tmp_path)
        check_server_has_the_run(server)
        Tracker("neptune", tmp_path, project="team/llama", resume_step=3).finish("failed")
        assert {"path": "sys/failed", "assignBool": {"value": True}} in server.operations
        Tracker("neptune", tmp_path, project="team/llama").finish("finished")
        identifiers = [run["customId"] for run in server.created]
    assert identifiers[0] == identifiers[1] != identifiers[2]
    output = capfd.readouterr()
    assert output.out == "" and output.err.count("/team/llama/e/P-1") == 3 and "offline" not in output.err


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("token", ["not a token", "bm90IGpzb24=", "closed port"])
def test_an_unusable_token_or_server_falls_back_to_offline_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, token: str
) -> None:
    import neptune  # noqa: F401  (not timed: its import alone takes seconds)

    token = make_token(f"http://127.0.0.1:{closed_port()}") if token == "closed port" else token
    monkeypatch.setenv("NEPTUNE_API_TOKEN", token)
    monkeypatch.setenv("NEPTUNE_PROJECT", "team/llama")
    start = time.monotonic()
    log_a_run(Tracker("neptune", tmp_path), tmp_path)
    assert time.monotonic() - start < 5  # the client alone would try for 60
    assert list((tmp_path / "neptune").glob(".neptune/offline/*/data-1.log"))
    output = capfd.readouterr()
    assert output.err.count("warning") == 1 and "recorded offline instead" in output.err and output.out == ""


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("NEPTUNE_API_TOKEN", make_token(f"http://127.0.0.1:{silent.getsockname()[1]}"))
        start = time.monotonic()
        run = NeptuneRun(tmp_path, "run", None, "team/llama", connect_seconds=1)
        assert time.monotonic() - start < 3
        run.finalize("finished")
    assert list((tmp_path / "neptune").glob(".neptune/offline/*/data-1.log"))


def test_a_server_lost_in_the_middle_neither_stops_nor_holds_up_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    with NeptuneServer() as server:
        monkeypatch.setenv("NEPTUNE_API_TOKEN", server.token)
        run = NeptuneRun(tmp_path, "run", None, "team/llama", stop_seconds=1)
    start = time.monotonic()
    for step in range(100):
        run.log_metrics(metrics={"train_loss": 1.0}, step=step)
    run.finalize("finished")
    assert time.monotonic() - start < 5
    output = capfd.readouterr()
    assert "not everything could be sent" in output.err and "neptune sync --path" in output.err and output.out == ""
    assert sum("train_loss" in path.read_text() for path in (tmp_path / "neptune").glob(".neptune/async/*/data-*.log"))


def test_a_tracker_that_fails_is_dropped_with_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    tracker = Tracker(["neptune", "tensorboard"], tmp_path)
    loggers = tracker.loggers
    loggers[-1]._run.stop()
    for step in range(1, 4):
        tracker.log_metrics({"train_loss": 1.0}, step)
    tracker.finish("finished")
    assert capfd.readouterr().err.count("warning: tracking with neptune failed") == 1
    assert tracker.loggers is loggers and [logger.name for logger in loggers] == ["csv", "tensorboard"]
    assert len(read_metrics(tmp_path / "metrics.csv")) == len(read_events(tmp_path).Scalars("train_loss")) == 3
