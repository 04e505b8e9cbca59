"""What the runs of an experiment measured, and what that allows to say: estimates, differences, the winner, a verdict.

A recipe with a learner is an `Arm`; its seeds are the rows of its scores. Every arm is compared with raw text of the
same learner on the same questions and seeds, and the p-values of these comparisons are corrected for their number.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lit_llama.evaluation import statistics
from lit_llama.evaluation.questions import wilson_interval
from lit_llama.evaluation.statistics import Estimate
from lit_llama.experiment_runs import Run, directory, is_finished, last_line
from lit_llama.files import atomic_file, read_json
from lit_llama.injection.comparison import (
    CONTEXTS,
    HEADLINE,
    QUESTIONS_ONLY,
    RAW,
    Experiment,
    cell_rows,
)

MINIMUM_EFFECT = 0.05
"""A difference below this is not claimed, however sure: questions and seeds of usual number do not settle it."""
BASE_METRIC = "contains"
"""What the base is measured by, and what it knew before: it answers in sentences, in which the answer is named."""
FEW_ENTITIES = 5
"""With fewer documents than this known, or unknown, a bootstrap cannot see its own uncertainty: Wilson's interval."""
COSTS = ("trainable_parameters", "tokens", "seconds", "training_seconds", "peak_memory_gb")


def collect(experiment: Experiment, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a run: what it was, whether it finished, what it measured and cost. Written to results.jsonl."""
    rows = [_collect_one(experiment, run) for run in runs]
    with atomic_file(experiment.out_dir / "results.jsonl") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return rows


def _collect_one(experiment: Experiment, run: Run) -> dict[str, Any]:
    place = directory(experiment, run)
    row: dict[str, Any] = {
        "run": run.name,
        "recipe": run.recipe,
        "learner": run.learner,
        "seed": run.seed,
        "options": run.options,
    }
    if not is_finished(experiment, run):
        error = last_line(place / "log.txt")
        return row | {"status": "failed" if error else "not run", "error": error}
    evaluation = read_json(place / "evaluation.json")
    kept = ("cells", "recall", "texts", "kl_to_base", "locality", "answer_entropy")
    row |= {"status": "finished", **{key: evaluation.get(key) for key in kept}}
    row["evaluation"] = str(place / "evaluation.json")
    if (place / "open_book.json").is_file():
        row["open_book"] = read_json(place / "open_book.json")["cells"]
    if run.training is not None:
        report, examples = read_json(place / "trained" / "report.json"), place / "trained-examples" / "examples.jsonl"
        row["costs"] = {key: report[key] for key in COSTS if report.get(key) is not None}
        if examples.is_file():
            with open(examples, encoding="utf-8") as file:
                row["costs"]["examples"] = sum(1 for line in file if "reason" not in json.loads(line))
    return row


@dataclass
class Arm:
    """A recipe with a learner, or a control (learner None).

    Attributes:
        rows: of results.jsonl, one a seed, finished ones and others.
        scores: (finished seeds, questions), the metric on the questions that count.
        headline: their mean.
        gain: headline minus that of raw text with the same learner, over the seeds that both finished.
        p: of the gain, corrected for the number of gains in the table.
    """

    recipe: str
    learner: str | None
    rows: list[dict[str, Any]]
    scores: np.ndarray
    headline: Estimate
    gain: Estimate | None = None
    p: float | None = None

    @property
    def name(self) -> str:
        return f"{self.recipe} with {self.learner}" if self.learner else self.recipe

    @property
    def finished(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["status"] == "finished"]

    @property
    def mark(self) -> str:
        """ "better" or "worse" than raw text, "" where that is not settled."""
        if self.p is None or self.gain is None or self.p >= 0.05:
            return ""
        return "better" if self.gain.value > 0 else "worse"

    def mean(self, value: Callable[[dict[str, Any]], float | None]) -> float | None:
        """Mean over finished seeds of something in a row of results; None where no row has it."""
        found = [number for number in map(value, self.finished) if number is not None]
        return float(np.mean(found)) if found else None

    def cell(self, split: str, cell: str, metric: str) -> float | None:
        """Mean over seeds of a metric in a cell."""
        return self.mean(lambda row: (row["cells"].get(split) or {}).get(cell, {}).get(metric))

    def cost(self, key: str) -> float | None:
        """Mean over seeds of a cost."""
        return self.mean(lambda row: row.get("costs", {}).get(key))


@dataclass
class Results:
    """All arms of an experiment, the best first, and what they are compared with; arms with one seed, where others
    have more, come behind."""

    experiment: Experiment
    arms: list[Arm]
    controls: dict[str, Arm]
    """The base, by the context that it is asked with: none, oracle, bm25."""
    failed: list[dict[str, Any]]
    entities: list[str] = field(repr=False)
    """What each question that counts is about."""
    environment: dict[str, Any] = field(repr=False)

    @property
    def base(self) -> Arm | None:
        return self.controls.get("none")

    @property
    def winner(self) -> Arm | None:
        return self.arms[0] if self.arms else None

    def raw(self, learner: str | None) -> Arm | None:
        return next((arm for arm in self.arms if (arm.recipe, arm.learner) == (RAW, learner)), None)

    def text_change(self, row: dict[str, Any], text: str) -> float | None:
        """Bits per byte of a text after training minus those of the base."""
        before = self.base and self.base.mean(lambda base: bits_per_byte(base, text))
        after = bits_per_byte(row, text)
        return None if before is None or after is None else after - before


def bits_per_byte(row: dict[str, Any], text: str) -> float | None:
    """Of a text, in a row of results."""
    return ((row.get("texts") or {}).get(text) or {}).get("bits_per_byte")


def summarise(experiment: Experiment, rows: Sequence[dict[str, Any]]) -> Results:
    """Estimates, differences and corrected p-values from the rows of results.jsonl and the evaluations they name."""
    entities: list[str] = []
    environment: dict[str, Any] = {}
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["recipe"], row["learner"]), []).append(row)
    arms = []
    for (recipe, learner), members in groups.items():
        scores = []
        for row in members:
            if row["status"] == "finished":
                evaluation = read_json(row["evaluation"])
                asked = cell_rows(evaluation["rows"], HEADLINE, experiment.cell)
                metric = BASE_METRIC if learner is None else experiment.metric
                scores.append([float(question[metric]) for question in asked])
                entities = [str(question["doc_id"]) for question in asked]
                environment = {key: evaluation[key] for key in ("hardware", "versions", "source") if key in evaluation}
        if scores:
            table = np.array(scores)
            arms.append(Arm(recipe, learner, members, table, estimate(table, entities)))
    named = {name: context for context, name in zip(CONTEXTS.values(), CONTEXTS, strict=True)}
    controls = {named[arm.recipe]: arm for arm in arms if arm.learner is None}
    trained = [arm for arm in arms if arm.learner is not None]
    most = max((len(arm.finished) for arm in trained), default=0)
    trained.sort(key=lambda arm: (len(arm.finished) == 1 < most, -arm.headline.value))
    failed = [row for row in rows if row["status"] != "finished"]
    results = Results(experiment, trained, controls, failed, entities, environment)
    compared = []
    for arm in trained:
        raw = results.raw(arm.learner)
        arm.gain = None if raw is None or raw is arm else difference(arm, raw, entities)
        if arm.gain is not None:
            compared.append(arm)
    for arm, p in zip(compared, statistics.holm([arm.gain.p for arm in compared]) if compared else (), strict=True):
        arm.p = p
    return results


def estimate(scores: np.ndarray, entities: Sequence[str]) -> Estimate:
    """Mean of scores (seeds, questions) with its interval, also where nearly every document is known, or none is."""
    found = statistics.bootstrap_mean(scores, entities)
    labels, entity_of = np.unique(entities, return_inverse=True)
    means = np.bincount(entity_of, scores.mean(axis=0)) / np.bincount(entity_of)
    if min((means > 0).sum(), (means < 1).sum()) < FEW_ENTITIES:
        low, high = wilson_interval(found.value * len(labels), len(labels))
        return found._replace(low=low, high=high)
    return found


def difference(first: Arm, second: Arm, entities: Sequence[str]) -> Estimate | None:
    """Mean of the first arm minus the second's over the seeds that both finished; None where there is no such seed."""
    seeds = [[row["seed"] for row in arm.finished] for arm in (first, second)]
    common = [seed for seed in seeds[0] if seed in seeds[1]]
    if not common:
        return None
    pair = [arm.scores[[own.index(s) for s in common]] for arm, own in zip((first, second), seeds, strict=True)]
    return statistics.paired_difference(*pair, entities)


# --- in plain words


def verdict(results: Results) -> list[str]:
    """What the numbers say, a few sentences; the first is the answer."""
    winner, experiment = results.winner, results.experiment
    if winner is None:
        return ["No run finished: there is nothing to compare yet."]
    sentences = [_against_raw(results, winner), *_named(results, winner)]
    sentences += [*_runner_up(results, winner), *_control_sentences(results, winner)]
    sentences += [_forgetting(results, winner), _cost(winner)]
    seeds = len(winner.finished)
    if seeds < 3:
        sentences.append(
            f"With {_count(seeds, 'seed')} this is a first look: 3 are usual to explore, 5 for a claim, and intervals"
            " say little about how much a run depends on its seed."
        )
    if results.failed:
        sentences.append(f"{_count(len(results.failed), 'run')} did not finish and count in nothing above.")
    if len(results.arms) > 2 and len(experiment.seeds) > 1:
        sentences.append("The winner was picked on the questions it is reported on: expect a little less on new ones.")
    return sentences


def _against_raw(results: Results, winner: Arm) -> str:
    scored = f"{percent(winner.headline.value)} of the questions ({_interval(winner.headline)})"
    tokens = f"{results.experiment.tokens:,} tokens"
    if winner.recipe == RAW:
        return f"No recipe beats raw text: raw with {winner.learner} answers most at {tokens}, {scored}."
    raw = results.raw(winner.learner)
    if raw is None or winner.gain is None:
        return (
            f"{winner.name} answers most at {tokens}, {scored}; there is no finished run of raw text to compare with."
        )
    said = f"{percent(raw.headline.value)} for raw text at the same {tokens}, {points(winner.gain)}"
    judged = statistics.verdict(winner.gain, MINIMUM_EFFECT)
    if winner.mark == "better" and judged == "PASS":
        return f"{winner.name} wins: it answers {scored} against {said}."
    if judged == "FAIL":
        return f"No recipe is clearly better than raw text: the best, {winner.name}, answers {scored} against {said}."
    return (
        f"INCONCLUSIVE: {winner.name} is ahead with {scored} against {said}; more seeds or questions would settle it."
    )


def _named(results: Results, winner: Arm) -> list[str]:
    """Raw text does not teach how to answer in few words: does it know what it says in many?"""
    raw, metric, cell = results.raw(winner.learner), results.experiment.metric, results.experiment.cell
    if raw is None or raw is winner or metric == BASE_METRIC:
        return []
    shares = [arm.cell(HEADLINE, cell, BASE_METRIC) for arm in (winner, raw)]
    if None in shares:
        return []
    return [f"Where it is enough that the answer is named, it is {percent(shares[0])} against {percent(shares[1])}."]


def _runner_up(results: Results, winner: Arm) -> list[str]:
    second = next(iter(results.arms[1:]), None)
    lead = second and difference(winner, second, results.entities)
    if second is None or lead is None:
        return []
    if lead.low > 0:
        return [f"It is ahead of the runner-up, {second.name}, by {points(lead)}."]
    level = [
        arm for arm in results.arms[2:] if (behind := difference(winner, arm, results.entities)) and behind.low <= 0
    ]
    others = f"; {_count(len(level), 'more arm')} cannot be told from it either" if level else ""
    return [
        f"INCONCLUSIVE which of the best is better: over {second.name} the lead is {points(lead)}, within the"
        f" uncertainty{others}."
    ]


def _control_sentences(results: Results, winner: Arm) -> list[str]:
    said = []
    closed, shown = results.base, results.controls.get("oracle")
    if closed is not None:
        text = f"The untrained base names the answer to {percent(closed.headline.value)}"
        said.append(text + (f", and to {percent(shown.headline.value)} with the document shown." if shown else "."))
    only = next((a for a in results.arms if (a.recipe, a.learner) == (QUESTIONS_ONLY, winner.learner)), None)
    if only is not None and only is not winner:
        more, reached = difference(winner, only, results.entities), percent(only.headline.value)
        if more is not None and more.low > 0:
            said.append(f"Questions without documents reach {reached}: the documents gave {points(more)}.")
        else:
            said.append(f"INCONCLUSIVE whether documents gave anything: questions without them reach {reached}.")
    never = winner.cell("never", results.experiment.cell, BASE_METRIC)
    before = closed and closed.cell("never", results.experiment.cell, BASE_METRIC)
    if never is not None and before is not None and never > before + MINIMUM_EFFECT:
        said.append(
            f"Warning: answers on documents never injected rose from {percent(before)} to {percent(never)}, so"
            " that part of the gain is the form of the answers, not knowledge."
        )
    return said


def _forgetting(results: Results, winner: Arm) -> str:
    changes = [results.text_change(row, "general") for row in winner.finished]
    known = [found for change in changes if (found := change) is not None]
    experiment, base = results.experiment, results.base
    if not known or base is None:
        return "What was forgotten was not measured: give data_dirs a general store."
    change, before = float(np.mean(known)), base.mean(lambda row: bits_per_byte(row, "general"))
    share = change / before
    size = "much was" if share > 0.10 else "a little was" if share > 0.02 else "next to nothing was"
    text = (
        f"General text went from {before:.3f} to {before + change:.3f} bits per byte ({share:+.1%}): {size} forgotten"
    )
    known_before, known_after = (arm.cell("known", experiment.cell, BASE_METRIC) for arm in (base, winner))
    if known_before is not None and known_after is not None:
        text += f"; of the questions it knew before, {percent(known_before)} became {percent(known_after)}"
    return f"{text}."


def _cost(winner: Arm) -> str:
    parts = []
    if (trained := winner.cost("trainable_parameters")) is not None:
        parts.append(f"{count(trained)} trained parameters")
    if (seconds := winner.cost("seconds")) is not None:
        parts.append(f"{duration(seconds)} a run")
    if (memory := winner.cost("peak_memory_gb")) is not None:
        parts.append(f"{memory:.1f} GB at peak")
    if (examples := winner.cost("examples")) is not None:
        parts.append(f"{examples:,.0f} examples made of the documents")
    return f"It cost {', '.join(parts)}." if parts else "Its cost is not on record."


def percent(value: float | None) -> str:
    """0.4 as "40.0 %", which no line break parts; "–" for None."""
    return "–" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def points(difference: Estimate) -> str:
    """A difference in points with its interval."""
    value, low, high = (100 * number for number in difference[:3])
    return f"{value:+.1f} points (95\N{NO-BREAK SPACE}% interval {low:+.1f} to {high:+.1f})"


def _interval(found: Estimate) -> str:
    return f"95\N{NO-BREAK SPACE}% interval {100 * found.low:.1f} to {100 * found.high:.1f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def count(value: float) -> str:
    """1234567 as "1.23M"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """75 as "1 min 15 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
