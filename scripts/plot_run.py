"""Draw the curves of one or many runs from their local files alone, and print a table of their first and last values.

Reads `metrics.csv`, and `probes.jsonl` and `lit_config.yaml` where they are, of each run directory; a run still going
on can be drawn too. What is written there is decided in `lit_llama/tracking.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from lit_llama.command_line import progress, run
from lit_llama.errors import InputError
from lit_llama.files import atomic_file, refuse_overwrite
from lit_llama.tracking import read_metrics, read_probes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any kind of colour vision, without its yellow, which is lost on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
LINE_STYLES = ("-", (0, (4, 1.5)), (0, (1, 1)))
LOSSES = {"train_loss": "training", "val_loss": "validation", "general_loss": "general text"}
PANELS = {
    "val_loss": "Validation loss",
    "train_loss": "Training loss",
    "general_loss": "General-text loss",
    "probe_accuracy": "Probe questions correct",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Tokens per second",
    "memory_gb": "Peak memory (GB)",
}


NOISY = ("train_loss", "tokens_per_second")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "xtick.color": "#999999",
    "ytick.color": "#999999",
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "axes.labelcolor": "#333333",
}


@dataclass
class Run:
    """One run directory, read. `label` tells it from the others; `settings` is its configuration, flattened."""

    label: str
    rows: list[dict[str, float]]
    settings: dict[str, Any]

    def series(self, metric: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """The x values and values (float64, shape (n,)) of every row in which both were measured."""
        points = [(row[x], row[metric]) for row in self.rows if x in row and metric in row]
        return tuple(np.array(points, dtype=np.float64).reshape(-1, 2).T)


def main(
    *,
    run_dirs: Path | list[Path],
    out: Path,
    x: Literal["step", "tokens", "seconds"] = "step",
    overwrite: bool = False,
) -> None:
    """Draw loss, learning rate, probe accuracy, speed and memory of runs, and print a table of them.

    Args:
        run_dirs: a run directory, a folder of run directories, or a list of these: '[out/a, out/b]'.
        out: the picture to write: .png, .svg or .pdf.
        x: what the curves are drawn against.
        overwrite: replace `out` if it exists.
    """
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--out {out}: the name must end in .png, .svg or .pdf")
    refuse_overwrite(out, overwrite)
    runs = read_runs(run_dirs if isinstance(run_dirs, list) else [run_dirs])
    for one in runs:
        if not any(x in row for row in one.rows):
            raise InputError(f"--x {x}: the metrics.csv of {one.label} has no values of {x}; choose another")
    print_table(runs)
    figure = draw(runs, x)
    with atomic_file(out, "wb") as file:
        save(figure, file, out.suffix[1:])
    progress(f"wrote {out}")


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories; a folder without a metrics.csv of its own stands for the runs in it, ordered by name."""
    directories = []
    for path in paths:
        inside = sorted(found.parent for found in path.glob("*/metrics.csv"))
        directories += [path] if (path / "metrics.csv").exists() or not inside else inside
    directories = list({path.resolve(): path for path in directories}.values())
    runs = []
    for path, label in zip(directories, labels(directories), strict=True):
        runs.append(Run(label, read_rows(path), read_settings(path)))
        if not runs[-1].rows:
            raise InputError(f"{path}/metrics.csv: no step has been recorded yet")
    return runs


def read_rows(directory: Path) -> list[dict[str, float]]:
    """Rows of metrics.csv; where it has no probe accuracy, that is counted from the scored answers of probes.jsonl."""
    # The evaluation before the first step, where nothing has been trained on, belongs on every axis.
    rows = [
        row if row["step"] else {"tokens": 0, "seconds": 0} | row for row in read_metrics(directory / "metrics.csv")
    ]
    if (directory / "probes.jsonl").exists() and not any("probe_accuracy" in row for row in rows):
        correct: dict[int, list[bool]] = {}
        for probe in read_probes(directory / "probes.jsonl"):
            if probe.get("correct") is not None:
                correct.setdefault(probe["step"], []).append(probe["correct"])
        rows = [
            row | {"probe_accuracy": np.mean(correct[row["step"]])} if row["step"] in correct else row for row in rows
        ]
    return rows


def read_settings(directory: Path) -> dict[str, Any]:
    """lit_config.yaml as {"train.learning_rate": 2e-4, ...}; empty where there is none."""
    import yaml

    def flatten(tree: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {name: leaf for key, value in tree.items() for name, leaf in flatten(value, f"{prefix}.{key}").items()}

    path = directory / "lit_config.yaml"
    if not path.exists():
        return {}
    try:
        return {
            name[1:]: value for name, value in flatten(yaml.safe_load(path.read_text(encoding="utf-8")), "").items()
        }
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None


def labels(directories: Sequence[Path]) -> list[str]:
    """The fewest last parts of the paths that tell the runs apart: names, or parent/name where names repeat."""
    parts = [path.resolve().parts for path in directories]
    depth = next(n for n in range(1, 1 + max(map(len, parts))) if len({part[-n:] for part in parts}) == len(parts))
    return ["/".join(part[-depth:]) for part in parts]


def print_table(runs: Sequence[Run]) -> None:
    """One line a run on stdout, its last columns the first few settings in which the runs differ."""
    names = dict.fromkeys(name for one in runs for name in one.settings if name not in ("out_dir", "tracker"))
    differing = [name for name in names if len({str(one.settings.get(name)) for one in runs}) > 1][:6]
    head = "run,steps,tokens,time,train loss,val loss,best (step),general loss,probes,tokens/s,GB".split(",")
    table = [head + [name.rpartition(".")[2] for name in differing]]
    for one in runs:
        steps, losses = one.series("val_loss")
        best = np.nanargmin(losses) if np.isfinite(losses).any() else None
        table.append(
            [
                one.label,
                f"{one.rows[-1]['step']}",
                count(last(one, "tokens")),
                duration(last(one, "seconds")),
                shown(last(one, "train_loss"), "{:.4f}"),
                change(one, "val_loss", "{:.4f}"),
                "" if best is None else f"{losses[best]:.4f} ({steps[best]:.0f})",
                change(one, "general_loss", "{:.4f}"),
                change(one, "probe_accuracy", "{:.0%}"),
                count(finite(one, "tokens_per_second", np.median)),
                shown(finite(one, "memory_gb", np.max), "{:.2f}"),
                *(str(one.settings.get(name, "")) for name in differing),
            ]
        )
    used = [column for column in range(len(table[0])) if any(row[column] for row in table[1:])]
    widths = {column: max(len(row[column]) for row in table) for column in used}
    for row in table:
        cells = [row[column].rjust(widths[column]) if column else row[0].ljust(widths[0]) for column in used]
        print("  ".join(cells).rstrip())


def finite(one: Run, metric: str, reduce: Callable[[np.ndarray], float]) -> float:
    """`reduce` over the finite values of a metric; nan where there are none."""
    values = one.series(metric)[1]
    values = values[np.isfinite(values)]
    return float(reduce(values)) if len(values) else math.nan


def last(one: Run, metric: str) -> float:
    return finite(one, metric, lambda values: values[-1])


def change(one: Run, metric: str, form: str) -> str:
    """ "3.2017 > 2.4410": first and last value of a metric."""
    start, end = shown(finite(one, metric, lambda values: values[0]), form), shown(last(one, metric), form)
    return f"{start} > {end}" if start != end else end


def shown(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else ""


def count(value: float, position: object = None) -> str:
    """1234567 as "1.23M"; also what an axis of counts is labelled with."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return shown(value, "{:.3g}")


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def scientific(value: float, position: object = None) -> str:
    """0.0002 as "2e-4": learning rates as they are typed."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


FORMATS = {
    "probe_accuracy": lambda value, position: f"{value:.0%}",
    "learning_rate": scientific,
    "tokens_per_second": count,
}


@dataclass
class Curve:
    """One line of a panel: its points (float64, shape (n,)) and how it looks."""

    xs: np.ndarray
    values: np.ndarray
    name: str
    color: str
    line: Any
    noisy: bool

    @property
    def smoothed(self) -> bool:
        return self.noisy and len(self.values) > 100

    def drawn(self) -> np.ndarray:
        """The values that the line shows: a running mean where there are many noisy ones."""
        return running_mean(self.values) if self.smoothed else self.values


def draw(runs: Sequence[Run], x: str) -> "Figure":
    """A large panel of the loss, its runs (of one run: its losses) named beside their curves, and small panels."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("plotting needs a package that is not installed: pip install matplotlib") from None

    measured = [metric for metric in PANELS if any(np.isfinite(one.series(metric, x)[1]).any() for one in runs)]
    if not measured:
        raise InputError(f"nothing to draw: no run has a finite value of any of {', '.join(PANELS)}")
    unit, x_label = x_axis(runs, x)

    def curve(number: int, metric: str, name: str, look: int) -> Curve:
        xs, values = runs[number].series(metric, x)
        color, line = COLORS[look % len(COLORS)], LINE_STYLES[look // len(COLORS) % len(LINE_STYLES)]
        return Curve(xs / unit, values, name, color, line, noisy=metric in NOISY)

    losses = [metric for metric in measured if metric in LOSSES]
    if len(runs) == 1 and losses:
        title, small = f"Loss of {runs[0].label}", [metric for metric in measured if metric not in LOSSES]
        large = [curve(0, metric, LOSSES[metric], look) for look, metric in enumerate(losses)]
    else:
        title, small = PANELS[measured[0]], measured[1:]
        large = [curve(number, measured[0], one.label, number) for number, one in enumerate(runs)]
    ends = curve_ends(large)
    # Rows of two or three small panels: 4 as 2 + 2, 5 as 3 + 2, 6 as 3 + 3.
    rows = np.array_split(np.array(small), math.ceil(len(small) / 3)) if small else []
    # All in inches. The names beside the large panel take about 0.08 a letter; below it, panels use the full width.
    width, left, right, between, above, below, small_height = 10.0, 0.6, 0.2, 0.65, 0.35, 0.5, 1.55
    large_height = max(3.2, 0.2 * len(ends))
    large_width = width - left - 0.4 - 0.08 * max(len(text) for *_, text, _ in ends)
    height = above + large_height + len(rows) * (above + 0.3 + small_height) + below
    x_last = max(row.get(x, 0) for one in runs for row in one.rows) / unit

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))

        def panel(metric: str, curves: Sequence[Curve], x: float, y: float, size: tuple[float, float]) -> "Axes":
            axes = figure.add_axes((x / width, y / height, size[0] / width, size[1] / height))
            draw_panel(axes, metric, curves)
            axes.set_xlim(-0.01 * x_last, 1.02 * x_last or 1)
            return axes

        bottom = height - above - large_height
        axes = panel(measured[0], large, left, bottom, (large_width, large_height))
        axes.set_title(title, weight="bold")
        name_curves(axes, ends, gap=0.18 / large_height)
        for metrics in rows:
            bottom -= above + 0.3 + small_height
            size = ((width - left - right - between * (len(metrics) - 1)) / len(metrics), small_height)
            for column, metric in enumerate(metrics):
                curves = [curve(number, metric, one.label, number) for number, one in enumerate(runs)]
                panel(metric, curves, left + column * (size[0] + between), bottom, size)
        for axes in figure.axes:
            if math.isclose(axes.get_position().y0, below / height):
                axes.set_xlabel(x_label)
    return figure


def save(figure: "Figure", file: BinaryIO, form: str) -> None:
    """Write a figure; the words of an SVG stay words, to be searched and to be small."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format=form, dpi=160)


def x_axis(runs: Sequence[Run], x: str) -> tuple[float, str]:
    """The unit that x is shown in, and the label that says so."""
    if x != "seconds":
        return 1, {"step": "step", "tokens": "tokens trained on"}[x]
    longest = max(row.get("seconds", 0) for one in runs for row in one.rows)
    return (3600, "hours") if longest >= 3 * 3600 else (60, "minutes") if longest >= 3 * 60 else (1, "seconds")


def draw_panel(axes: "Axes", metric: str, curves: Sequence[Curve]) -> None:
    """Curves of a metric; noisy ones as a running mean, above their values if they are few; short ones with points."""
    from matplotlib.ticker import MaxNLocator

    for one in curves:
        if one.smoothed and len(curves) <= 3:
            axes.plot(one.xs, one.values, color=one.color, linewidth=0.6, alpha=0.25)
        marker = "o" if len(one.xs) <= 25 else ""
        axes.plot(one.xs, one.drawn(), color=one.color, linestyle=one.line, linewidth=1.5, marker=marker, markersize=3)
    round_numbers = [1, 2, 2.5, 5, 10]
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=round_numbers))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=round_numbers))
    axes.xaxis.set_major_formatter(count)
    axes.set_title(PANELS[metric])
    if metric in FORMATS:
        axes.yaxis.set_major_formatter(FORMATS[metric])
    if metric not in LOSSES:
        highest = max((np.nanmax(one.values) for one in curves if np.isfinite(one.values).any()), default=0)
        axes.set_ylim(0, 1.1 * highest or 1)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a twentieth of the points, fewer at the ends; a nan stays one and is in no mean."""
    width = len(values) // 40
    known = np.isfinite(values)
    sums = np.concatenate([[0], np.cumsum(np.where(known, values, 0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    starts = np.clip(np.arange(len(values)) - width, 0, None)
    ends = np.clip(np.arange(len(values)) + width + 1, None, len(values))
    return np.where(known, (sums[ends] - sums[starts]) / np.maximum(counts[ends] - counts[starts], 1), np.nan)


def curve_ends(curves: Sequence[Curve]) -> list[tuple[float, float, str, Curve]]:
    """x and value of each curve's last finite point and what to write beside it, by ascending value."""
    ends = []
    for one in curves:
        known = np.flatnonzero(np.isfinite(one.values))
        if len(known):
            value = one.drawn()[known[-1]]
            text = f"{shorten(one.name)}  {value:.3f}" + (", then nan" if known[-1] < len(one.values) - 1 else "")
            ends.append((one.xs[known[-1]], value, text, one))
    return sorted(ends, key=lambda end: end[1])


def name_curves(axes: "Axes", ends: Sequence[tuple[float, float, str, Curve]], gap: float) -> None:
    """Write the names right of the panel in their curves' colours, at least `gap` (a part of its height) apart."""
    low, high = axes.get_ylim()
    heights = spread([(value - low) / (high - low) for _, value, *_ in ends], gap)
    for (x, value, text, one), height in zip(ends, heights, strict=True):
        leader = {"arrowstyle": "-", "linestyle": one.line, "color": one.color, "linewidth": 0.7, "alpha": 0.7}
        place = {"xytext": (1.03, height), "textcoords": "axes fraction", "va": "center", "color": one.color}
        axes.annotate(text, (x, value), arrowprops={**leader, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}, **place)


def spread(heights: Sequence[float], gap: float) -> np.ndarray:
    """Ascending heights moved as little as possible (least squares) to lie `gap` apart, and within 0..1 if they fit."""
    blocks: list[tuple[float, int]] = []  # mean and size of neighbours that push each other
    for index, height in enumerate(heights):
        mean, size = height - index * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, others = blocks.pop()
            mean, size = (mean * size + other * others) / (size + others), size + others
        blocks.append((mean, size))
    moved = np.repeat([mean for mean, _ in blocks], [size for _, size in blocks])
    return np.clip(moved, 0, max(1 - gap * (len(heights) - 1), 0)) + gap * np.arange(len(heights))


def shorten(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:15]}…{name[-16:]}"


if __name__ == "__main__":
    run(main)
