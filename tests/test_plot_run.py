"""scripts/plot_run.py on runs that the tracker wrote: what it prints, draws (read back from the SVG) and refuses."""

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script

from lit_llama.command_line import run
from lit_llama.tracking import Tracker


@pytest.fixture(scope="module")
def plot() -> Callable[..., None]:
    """The script as a function of its command line, in this process: its start is most of its time."""
    specification = importlib.util.spec_from_file_location("plot_run", ROOT / "scripts/plot_run.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["plot_run"] = module
    specification.loader.exec_module(module)
    return lambda *arguments: run(module.main, [str(argument) for argument in arguments])


def write_run(out_dir: Path, steps: int = 40, probes: bool = True, nan_from: int | None = None, rank: int = 16) -> Path:
    tracker = Tracker("csv", out_dir)
    for step in range(steps + 1):
        metrics = {"val_loss": 3.0 - 0.02 * step}
        if step:
            metrics |= {"seconds": 2.0 * step, "tokens": 1000 * step}
            metrics |= {"train_loss": 2.9 - 0.02 * step, "learning_rate": 2e-4, "tokens_per_second": 500.0}
            metrics |= {"memory_gb": 3.25}
        if nan_from is not None and step >= nan_from:
            metrics |= {"val_loss": math.nan, "train_loss": math.nan}
        tracker.log_metrics(metrics, step)
        if probes and step % 20 == 0:
            correct = [index < step // 10 for index in range(8)]
            tracker.log_probes(
                [{"question": "q", "answer": "a", "answers": ["b"], "correct": c} for c in correct], step
            )
    tracker.finish("finished")
    (out_dir / "lit_config.yaml").write_text(
        f"out_dir: {out_dir}\ntracker: {out_dir}\nlora:\n  r: {rank}\n  alpha: 32\n"
    )
    return out_dir


def texts(svg: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())


def test_one_run_is_drawn_with_its_losses_and_probes_and_summed_up(tmp_path: Path) -> None:
    run = write_run(tmp_path / "domain")
    process = run_script("scripts/plot_run.py", "--run_dirs", run, "--out", run / "plot.svg")
    head, row = process.stdout.splitlines()
    assert re.split(r"\s{2,}", head) == (
        "run,steps,tokens,time,train loss,val loss,best (step),probes,tokens/s,GB".split(",")
    )
    assert re.split(r"\s{2,}", row) == [
        "domain", "40", "40k", "1m20s", "2.1000", "3.0000 > 2.2000", "2.2000 (40)", "0% > 50%", "500", "3.25",
    ]  # fmt: skip
    drawn = texts(run / "plot.svg")
    for text in ("Loss of domain", "training  2.100", "validation  2.200", "Probe questions correct", "2e-4", "step"):
        assert text in drawn
    assert "General-text loss" not in drawn


def test_a_folder_of_ten_runs_is_labelled_run_by_run_without_overlap(tmp_path: Path, plot, capsys) -> None:
    for index in range(10):
        write_run(tmp_path / "sweep" / f"run-{index}", rank=2 ** (index % 3), steps=40 - index % 2)
    out = tmp_path / "plot.svg"
    plot("--run_dirs", tmp_path / "sweep", "--out", out, "--x", "tokens")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [f"run-{index}" for index in range(10)]
    assert lines[0].split()[-1] == "r" and [line.split()[-1] for line in lines[1:4]] == ["1", "2", "4"]
    assert "tokens trained on" in texts(out)
    # Where each name stands: all ends have one of two values, and still no two names touch (9 pt text).
    heights = {name: float(y) for y, name in re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>(run-\d)  2', out.read_text())}
    assert len(heights) == 10
    assert np.diff(sorted(heights.values())).min() > 9


def test_runs_without_probes_with_nan_and_still_going_on_are_drawn(tmp_path: Path, plot, capsys) -> None:
    runs = [
        write_run(tmp_path / "a" / "run", probes=False),
        write_run(tmp_path / "b" / "run", nan_from=20),
        write_run(tmp_path / "c" / "run", steps=150),
    ]
    with open(runs[2] / "metrics.csv", "a") as file:
        file.write("151,1.5,7")
    out = tmp_path / "plot.svg"
    plot("--run_dirs", f"[{', '.join(map(str, runs))}]", "--out", out)
    output = capsys.readouterr().out
    assert [line.split()[0] for line in output.splitlines()[1:]] == ["a/run", "b/run", "c/run"]
    assert "2.6200 (19)" in output
    assert "b/run  2.620, then nan" in texts(out)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_pictures_are_what_their_names_say(tmp_path: Path, plot, suffix: str, start: bytes) -> None:
    out = tmp_path / f"plot{suffix}"
    plot("--run_dirs", write_run(tmp_path / "run"), "--out", out, "--x", "seconds")
    assert out.read_bytes().startswith(start)


def test_wrong_input_is_one_line_and_writes_nothing(tmp_path: Path, plot, capsys) -> None:
    run_dir = write_run(tmp_path / "run")
    empty = tmp_path / "empty"
    Tracker("csv", empty).finish("finished")
    only_loss = Tracker("csv", tmp_path / "only_loss")
    only_loss.log_metrics({"val_loss": 1.0}, 1)
    (tmp_path / "old.png").write_text("old")
    out = tmp_path / "plot.png"
    for arguments, complaint in [
        (("--run_dirs", run_dir, "--out", tmp_path / "plot.gif"), "must end in .png, .svg or .pdf"),
        (("--run_dirs", tmp_path / "none", "--out", out), "none/metrics.csv: no such file"),
        (("--run_dirs", empty, "--out", out), "empty/metrics.csv: no step has been recorded yet"),
        (("--run_dirs", tmp_path / "only_loss", "--out", out, "--x", "tokens"), "only_loss has no values of tokens"),
        (("--run_dirs", run_dir, "--out", tmp_path / "old.png"), "--overwrite"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            plot(*arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and complaint in error and error.count("\n") == 1, error
    assert not out.exists() and (tmp_path / "old.png").read_text() == "old"
    plot("--run_dirs", run_dir, "--out", tmp_path / "old.png", "--overwrite", "true")
    assert (tmp_path / "old.png").read_bytes().startswith(b"\x89PNG")
