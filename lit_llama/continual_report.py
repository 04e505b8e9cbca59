"""What the runs of a continual-learning experiment measured: matrices, figures, differences, report.md and a plot.

R[i, j] is the accuracy on the j-th task of an order after i tasks have been learned; row 0 is the base. From it come

    average accuracy    mean over j of R[T, j]
    backward transfer   mean over j < T of R[T, j] - R[j, j]                     (Lopez-Paz & Ranzato 2017)
    forgetting          mean over j < T of max over 1 <= i < T of R[i, j] - R[T, j]     (Chaudhry et al. 2018)
    forward transfer    mean over j > 1 of R[j - 1, j] - R[0, j]                 (Lopez-Paz & Ranzato 2017)

(arXiv 1706.08840 and 1801.10112.) What an isolated adapter answers does not depend on what others learn: its task's
column is the base's until it has been learned, and constant from then on. Running the experiment is `continual.py`'s.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_llama.continual_experiment import (
    BASE,
    JOINT,
    ONCE,
    RESULT,
    ContinualExperiment,
    orders_of,
    strategies_of,
)
from lit_llama.errors import InputError
from lit_llama.evaluation.statistics import Estimate, bootstrap_mean, paired_difference
from lit_llama.experiment_runs import Run, directory, is_finished, last_line
from lit_llama.files import atomic_file, atomic_path, read_json
from lit_llama.hardware import run_environment
from lit_llama.injection.comparison_report import Table, aligned
from lit_llama.injection.comparison_results import count, duration, percent, points
from lit_llama.run_files import plain_arguments

COMPARED_WITH = "sequence"
COLORS = ("#4269d0", "#ef7d17", "#3a9e57", "#d6457b", "#8a63d2", "#9c6b4e", "#5f6b7a")


def average(matrix: np.ndarray) -> float:
    """Mean of the last row of a matrix (tasks + 1, tasks)."""
    return float(matrix[-1].mean())


def just_learned(matrix: np.ndarray) -> float:
    """Mean over tasks right after each was learned: of the diagonal, the base's row apart."""
    return float(np.diagonal(matrix[1:]).mean())


def backward_transfer(matrix: np.ndarray) -> float:
    """How much better the earlier tasks are at the end than when each was just learned; negative: forgotten."""
    return float((matrix[-1] - np.diagonal(matrix[1:]))[:-1].mean())


def forgetting(matrix: np.ndarray) -> float:
    """How far the earlier tasks are at the end below their best at any time before; the base's row does not count."""
    return float((matrix[1:-1].max(axis=0) - matrix[-1])[:-1].mean())


def forward_transfer(matrix: np.ndarray) -> float:
    """How much better than the base the model is at tasks that come next."""
    return float((np.diagonal(matrix[1:-1], offset=1) - matrix[0, 1:]).mean())


FIGURES: dict[str, Callable[[np.ndarray], float]] = {
    "average": average,
    "just_learned": just_learned,
    "backward_transfer": backward_transfer,
    "forgetting": forgetting,
    "forward_transfer": forward_transfer,
}


class Outcome(NamedTuple):
    """A finished run, as if with this order: one that does not depend on it stands for all."""

    result: dict[str, Any]
    order: list[str]
    number: int
    """Of the order, from 1."""


def matrix(result: dict[str, Any], order: Sequence[str], base: dict[str, Any], measure: str) -> np.ndarray:
    """R (tasks + 1, tasks) of `loss` or a metric; NaN where nothing was measured, as before a joint run's end."""
    stages, row = result["stages"], base["stages"][0]["scores"]
    by_task = {stage["learned"][-1]: stage["scores"] for stage in stages}
    rows = [row]
    for number, task in enumerate(order, start=1):
        if len(stages) < len(order):  # all at once
            row = stages[-1]["scores"] if number == len(order) else {}
        else:
            row = row | by_task[task]  # an isolated adapter is asked about its own task only
        rows.append(row)
    return np.array([[row[task][measure] if task in row else np.nan for task in order] for row in rows])


class Learner(NamedTuple):
    """A strategy with its finished runs, those of all orders and seeds."""

    label: str
    name: str
    outcomes: list[Outcome]


class Results(NamedTuple):
    """All that the report shows."""

    experiment: ContinualExperiment
    base: dict[str, Any] | None
    learners: list[Learner]
    failed: list[dict[str, Any]]


def collect(experiment: ContinualExperiment, runs: Sequence[Run]) -> Results:
    """Read what the runs left, and write one line for each to results.jsonl."""
    results = {run.name: read_json(directory(experiment, run) / RESULT) for run in runs if is_finished(experiment, run)}
    base, orders, lines, learners, failed = results.get(BASE), orders_of(experiment), [], {}, []
    strategies = {strategy.label: strategy.name for strategy in strategies_of(experiment)}
    for run in runs:
        line: dict[str, Any] = {"run": run.name, "strategy": run.recipe, "order": run.options["order"]}
        line["seed"] = run.seed
        result, kind = results.get(run.name), strategies.get(run.recipe, BASE)
        if result is None:
            error = last_line(directory(experiment, run) / "log.txt")
            line |= {"status": "failed" if error else "not run", "error": error}
            failed.append(line)
        else:
            line |= {"status": "finished", **_summary(experiment, result, run.options["order"], base)}
        lines.append(line)
        if result is not None and kind != BASE:
            numbered = [(n, order) for n, order in enumerate(orders, start=1)]
            mine = numbered if kind in ONCE else [pair for pair in numbered if pair[1] == result["order"]]
            found = learners.setdefault(run.recipe, Learner(run.recipe, kind, []))
            found.outcomes.extend(Outcome(result, order, number) for number, order in mine)
    with atomic_file(experiment.out_dir / "results.jsonl") as file:
        file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    return Results(experiment, base, list(learners.values()), failed)


def _summary(
    experiment: ContinualExperiment, result: dict[str, Any], order: list[str], base: dict[str, Any] | None
) -> dict[str, Any]:
    """Matrices, figures and costs of a run, as JSON."""
    summary: dict[str, Any] = {"costs": costs(result)}
    if base is None or result is base:
        return summary
    for key, sign in (("accuracy", 1), ("loss", -1)):
        found = matrix(result, order, base, experiment.metric if key == "accuracy" else "loss")
        summary[key] = {"matrix": [[None if np.isnan(value) else float(value) for value in row] for row in found]}
        for name, figure in FIGURES.items():
            if not np.isnan(value := figure(sign * found)):
                summary[key][name] = value if name == "forgetting" else sign * value
    overlaps = [stage["overlap"] for stage in result["stages"] if "overlap" in stage]
    return summary | ({"overlap": overlaps} if overlaps else {})


def costs(result: dict[str, Any]) -> dict[str, float]:
    """Tokens and seconds of all its tasks, the parameters that were trained for one and for all, the peak of memory."""
    stages = [stage["costs"] for stage in result["stages"] if "costs" in stage]
    totals = {key: sum(stage[key] for stage in stages) for key in ("tokens", "seconds")}
    largest = {
        key: max((stage[key] for stage in stages), default=0) for key in ("trainable_parameters", "peak_memory_gb")
    }
    return totals | largest


# --- what differences are worth


def question_scores(outcome: Outcome, metric: str, tasks: Sequence[str], just_then: bool = False) -> np.ndarray:
    """The final score of each question of some tasks, or less that when its task was just learned; each task weighs
    the same, however many questions it has."""
    stages = outcome.result["stages"]
    at_once = {stage["learned"][-1]: stage for stage in stages}
    rows = []
    for task in tasks:
        last = stages[-1] if task in stages[-1]["scores"] else at_once[task]
        then = [row[metric] for row in last["scores"][task]["questions"]]
        before = (
            [row[metric] for row in at_once[task]["scores"][task]["questions"]] if just_then else np.zeros(len(then))
        )
        rows.append(np.subtract(then, before) / len(then))
    return np.concatenate(rows) * sum(map(len, rows)) / len(rows)


def entities(outcome: Outcome, tasks: Sequence[str]) -> list[str]:
    """What each of these questions is about."""
    scores = {task: found for stage in outcome.result["stages"] for task, found in stage["scores"].items()}
    return [row["entity"] for task in tasks for row in scores[task]["questions"]]


def final_accuracy(results: Results, learner: Learner) -> Estimate:
    """Average accuracy at the end, resampled over runs and entities."""
    tasks = sorted(learner.outcomes[0].order)
    scores = [question_scores(outcome, results.experiment.metric, tasks) for outcome in learner.outcomes]
    return bootstrap_mean(scores, entities(learner.outcomes[0], tasks))


def compared(results: Results, learner: Learner, other: Learner) -> Estimate | None:
    """Average accuracy at the end less that of another strategy, over the orders and seeds that both finished."""
    tasks, metric = sorted(learner.outcomes[0].order), results.experiment.metric
    others = {(one.number, one.result["seed"]): one for one in other.outcomes}
    pairs = [(one, others.get((one.number, one.result["seed"]))) for one in learner.outcomes]
    pairs = [pair for pair in pairs if pair[1] is not None]
    if learner is other or not pairs:
        return None
    scores = ([question_scores(one, metric, tasks) for one in column] for column in zip(*pairs, strict=True))
    return paired_difference(*scores, entities(learner.outcomes[0], tasks))


def backward(results: Results, learner: Learner) -> Estimate | None:
    """Backward transfer, resampled over entities and the seeds that finished all orders; None where it has none.

    What counts are the questions on all tasks but an order's last: which these are differs between orders, so the
    orders stand side by side.
    """
    found: dict[int, dict[int, Outcome]] = {}
    for outcome in learner.outcomes:
        found.setdefault(outcome.number, {})[outcome.result["seed"]] = outcome
    seeds = sorted(set.intersection(*map(set, found.values())))
    if learner.name == JOINT or not seeds:
        return None
    columns, labels = [], []
    for of_order in found.values():
        earlier = of_order[seeds[0]].order[:-1]
        columns.append(
            [question_scores(of_order[s], results.experiment.metric, earlier, just_then=True) for s in seeds]
        )
        labels += entities(of_order[seeds[0]], earlier)
    return bootstrap_mean(np.concatenate(columns, axis=1), labels)


# --- report.md


def write_report(results: Results, command: str) -> None:
    """Write report.md and accuracy.png into the experiment's out_dir."""
    experiment = results.experiment
    lines = [f"# Learning task after task with {experiment.checkpoint_dir.name}", "", *_subtitle(results), ""]
    if results.learners and results.base is not None:
        write_plot(results, experiment.out_dir / "accuracy.png")
        lines += [verdict(results), "", "![accuracy after each task](accuracy.png)", ""]
    for table in tables(results):
        lines += [f"## {table.title}", "", *([table.note, ""] if table.note else []), *aligned(table), ""]
    with atomic_file(experiment.out_dir / "report.md") as file:
        file.write("\n".join([*lines, "## Reproduce", "", f"```\n{command}\n```", ""]))


def tables(results: Results) -> list[Table]:
    """All tables that have rows."""
    made = [settings_table(results), failed_table(results)]
    if results.base is not None and results.learners:
        made = [main_table(results), loss_table(results), *matrix_tables(results), *made]
    return [table for table in made if table.rows]


def _subtitle(results: Results) -> list[str]:
    experiment = results.experiment
    orders = "; ".join(f"order {n}: {', '.join(order)}" for n, order in enumerate(orders_of(experiment), start=1))
    return [
        f"{len(strategies_of(experiment))} strategies, {len(experiment.seeds)} seeds, {orders}. Accuracy is"
        f" {experiment.metric.replace('_', ' ')} of closed-book answers."
    ]


def verdict(results: Results) -> str:
    """Which strategy knows most at the end, and how far it is from plain sequence and from the bounds."""
    ends = {learner.label: final_accuracy(results, learner).value for learner in results.learners}
    learning = [learner for learner in results.learners if learner.name not in ONCE]
    parts = []
    if learning:
        best = max(learning, key=lambda learner: ends[learner.label])
        parts.append(f"After the last task {best.label} knows most: {percent(ends[best.label])} of the answers")
        sequence = next((learner for learner in learning if learner.name == COMPARED_WITH), None)
        difference = None if sequence is None else compared(results, best, sequence)
        parts += [] if difference is None else [f"{points(difference)} over plain sequence"]
    bounds = [learner.label for learner in results.learners if learner.name in ONCE]
    return "; ".join([*parts, *(f"{label} {percent(ends[label])}" for label in bounds)]) + "."


def _mean(results: Results, learner: Learner, measure: str, figure: Callable[[np.ndarray], float]) -> float | None:
    """The mean of a figure over a learner's runs; None where it has no such figure."""
    values = [figure(matrix(one.result, one.order, results.base, measure)) for one in learner.outcomes]
    return None if np.isnan(values).any() else float(np.mean(values))


def _interval(found: Estimate | None) -> str:
    if found is None:
        return "–"
    return f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f}"


def main_table(results: Results) -> Table:
    """Every strategy: accuracy at the end and against plain sequence, transfer, forgetting, cost."""
    metric, rows = results.experiment.metric, []
    sequence = next((one for one in results.learners if one.name == COMPARED_WITH), None)
    for learner in results.learners:
        end = final_accuracy(results, learner)
        cost = {key: float(np.mean([costs(one.result)[key] for one in learner.outcomes])) for key in _COSTS}
        rows.append(
            [
                learner.label,
                f"{percent(end.value)} ({100 * end.low:.1f} to {100 * end.high:.1f})",
                "–" if sequence is None else _interval(compared(results, learner, sequence)),
                percent(_mean(results, learner, metric, just_learned)),
                _interval(backward(results, learner)),
                _points(_mean(results, learner, metric, forgetting)),
                _points(_mean(results, learner, metric, forward_transfer)),
                *(form(cost[key]) for key, form in _COSTS.items()),
                str(len({id(one.result) for one in learner.outcomes})),
            ]
        )
    header = ["strategy", "accuracy at the end", "points over sequence", "just learned", "backward transfer"]
    header += ["forgetting", "forward transfer", "tokens", "training", "trained at a time", "memory", "runs"]
    note = (
        "Means over orders and seeds; intervals are 95 %, resampled over runs and over what questions are about, and"
        " for differences paired. Transfer and forgetting are in points; isolated adapters need to be told the task,"
        " and joint training sees all tasks at once."
    )
    return Table("Accuracy, forgetting and cost", note, header, rows)


_COSTS: dict[str, Callable[[float], str]] = {
    "tokens": count,
    "seconds": duration,
    "trainable_parameters": count,
    "peak_memory_gb": lambda value: f"{value:.2f} GB",
}


def loss_table(results: Results) -> Table:
    """The same of the loss, where more is worse."""
    figures = (average, just_learned, lambda found: forgetting(-found))
    rows = []
    for learner in results.learners:
        values = [_mean(results, learner, "loss", figure) for figure in figures]
        rows.append([learner.label, *("–" if value is None else f"{value:.3f}" for value in values)])
    note = "Nats a token, of held-out text where a task has some, else of what it was trained on."
    return Table("Loss", note, ["strategy", "at the end", "just learned", "forgetting"], rows)


def matrix_tables(results: Results) -> list[Table]:
    """R of every strategy, mean over seeds, for each order."""
    found = []
    for number, order in enumerate(orders_of(results.experiment), start=1):
        rows = []
        for learner in results.learners:
            mean = seed_means(results, learner, number, order)
            for after, row in enumerate([] if mean is None else mean):
                if not after and not rows:
                    rows.append(["base", *map(percent, row)])
                elif after and not np.isnan(row).all():
                    rows.append([f"{learner.label}, after {order[after - 1]}", *map(percent, row)])
        found.append(Table(f"Order {number}: {', '.join(order)}", "", ["accuracy on", *order], rows))
    return found


def seed_means(results: Results, learner: Learner, number: int, order: Sequence[str]) -> np.ndarray | None:
    """R of an order, mean over its finished seeds; None where there is none."""
    own = [one.result for one in learner.outcomes if one.number == number]
    return (
        np.mean([matrix(one, order, results.base, results.experiment.metric) for one in own], axis=0) if own else None
    )


def failed_table(results: Results) -> Table:
    """Runs without a result, and why."""
    rows = [[line["run"], line["status"], line["error"]] for line in results.failed]
    return Table("Runs that did not finish", "Repeat the command to try again.", ["run", "", "what it said last"], rows)


def settings_table(results: Results) -> Table:
    """The experiment's options, and what it was carried out with."""
    given = plain_arguments(results.experiment)
    rows = [
        [name, value if isinstance(value, str) else json.dumps(value)]
        for name, value in given.items()
        if value not in (None, [], False) and name not in ("action", "tasks")
    ]
    environment = results.base or run_environment()
    hardware = environment["hardware"]
    rows.append(["hardware", f"{', '.join(hardware['gpu']) or hardware['cpu']}, {hardware['cpu_count']} cores"])
    rows.append(["versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())])
    return Table("Settings and hardware", "", ["", ""], rows)


# --- the plot


def write_plot(results: Results, path: Path) -> None:
    """Accuracy after each task: of the tasks learned so far, and of the first one; a column of panels for each order.

    Raises:
        InputError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("plotting needs a package that is not installed: pip install matplotlib") from None
    orders = orders_of(results.experiment)
    figure = Figure(figsize=(3.4 * len(orders) + 1.6, 5.4), layout="constrained")
    panels = figure.subplots(2, len(orders), sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for column, order in enumerate(orders):
        steps = np.arange(1, len(order) + 1)
        for look, learner in enumerate(results.learners):
            mean = seed_means(results, learner, column + 1, order)
            if mean is None:
                continue
            apart = 0.03 * (look - (len(results.learners) - 1) / 2)  # equal ones shall not hide each other
            color, line = COLORS[look % len(COLORS)], ("-", "--", ":")[look // len(COLORS) % 3]
            for axes, values in zip(panels[:, column], _curves(mean), strict=True):
                if learner.name == JOINT:  # there is no way to it, only an end
                    handles[learner.label] = axes.axhline(values[-1], color=color, linestyle="--", linewidth=1.2)
                else:
                    (handles[learner.label],) = axes.plot(
                        steps + apart, values, line, color=color, marker="o", markersize=4
                    )
        for axes, title in zip(panels[:, column], ("the tasks learned so far", f"the first, {order[0]}"), strict=True):
            axes.set_title(f"Accuracy on {title}", fontsize=10)
            axes.set_xticks(steps, [f"after {task}" for task in order], fontsize=8)
            axes.set_xlim(0.8, len(order) + 0.2)
            axes.set_ylim(0, max(0.05, axes.get_ylim()[1]))
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
            axes.grid(axis="y", color="#e4e4e4")
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def _curves(mean: np.ndarray) -> tuple[list[float], list[float]]:
    """After each task: the mean over those learned so far, and the first one's accuracy."""
    so_far = [float(row[:after].mean()) for after, row in enumerate(mean[1:], start=1)]
    return so_far, mean[1:, 0].tolist()
