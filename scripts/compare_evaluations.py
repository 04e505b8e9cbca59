"""Print what training changed: two evaluations of the same questions and texts, what it cost, and a verdict.

Reads what scripts/evaluate.py wrote for the base model and for the trained one, and the training run's report.json.
The table is Markdown on stdout; the verdict is computed from the numbers, and says so when little was learned.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama.command_line import run
from lit_llama.errors import InputError
from lit_llama.files import read_json

MEASURES = {"exact_match": "exact match", "f1": "F1", "contains": "answer named", "rouge_l": "ROUGE-L"}


def main(*, base: Path, adapter: Path, report: Path | None = None, general: str = "general") -> None:
    """Compare two evaluations.

    Args:
        base: JSON of scripts/evaluate.py for the model before training.
        adapter: The same for the model after training, with the same questions and texts.
        report: The training run's report.json, for what it cost.
        general: Name of the text that measures forgetting; every other text is the domain's.
    """
    before, after = (Evaluation.read(path) for path in (base, adapter))
    check_alike(before, after)
    rows = perplexity_rows(before, after, general) + question_rows(before, after)
    print(table(("", "before", "after", "change"), rows))
    if report is not None:
        print("\n" + cost(read_report(report)))
    print("\n" + verdict(before, after, general))


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: perplexity of each text by name, and the scores of the questions (None where none were asked)."""

    path: Path
    perplexity: dict[str, float]
    questions: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """Read a file of scripts/evaluate.py; one that lacks a part is an InputError that names it."""
        values = read_json(path)
        try:
            perplexity = {name: float(text["perplexity"]) for name, text in values.get("perplexity", {}).items()}
            questions = values.get("questions")
            if questions is not None:
                for scores in (questions, *questions["by_field"].values(), *questions["by_split"].values()):
                    for key in ("count", *MEASURES):
                        float(scores[key])
                questions["rows"] = {row["id"]: row for row in questions["rows"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: not an evaluation of scripts/evaluate.py ({error} is missing or wrong)"
            ) from None
        if not perplexity and not questions:
            raise InputError(f"{path}: neither a perplexity nor questions in it")
        return cls(path, perplexity, questions)


def check_alike(before: Evaluation, after: Evaluation) -> None:
    """Refuse two evaluations that did not measure the same things."""
    if before.perplexity.keys() != after.perplexity.keys():
        names = [", ".join(evaluation.perplexity) or "none" for evaluation in (before, after)]
        raise InputError(f"{before.path} and {after.path} measured different texts ({names[0]}; {names[1]})")
    ids = [set(evaluation.questions["rows"]) if evaluation.questions else set() for evaluation in (before, after)]
    if ids[0] != ids[1]:
        raise InputError(
            f"{before.path} and {after.path} asked different questions ({len(ids[0] ^ ids[1])} are in one only)"
        )


def perplexity_rows(before: Evaluation, after: Evaluation, general: str) -> list[tuple[str, ...]]:
    """One row a text, the general one last."""
    rows = []
    for name in sorted(before.perplexity, key=lambda name: name == general):
        old, new = before.perplexity[name], after.perplexity[name]
        title = "general text" if name == general else f"held-out {name}"
        rows.append((f"perplexity, {title}", f"{old:.2f}", f"{new:.2f}", f"{new / old - 1:+.1%}"))
    return rows


def question_rows(before: Evaluation, after: Evaluation) -> list[tuple[str, ...]]:
    """Answers in all by each measure, then answers that contain the gold one by field and by split."""
    if not before.questions:
        return []
    rows = []
    for key, title in MEASURES.items():
        old, new = before.questions[key], after.questions[key]
        rows.append((f"closed-book answers, {title}", f"{old:.1%}", f"{new:.1%}", f"{100 * (new - old):+.1f} points"))
    for group in ("by_field", "by_split"):
        for name, old in before.questions[group].items():
            new = after.questions[group][name]
            title = f"about {name} documents" if group == "by_split" else name.replace("_", " ")
            named = [round(scores["contains"] * scores["count"]) for scores in (old, new)]
            counts = (f"{count} of {old['count']}" for count in named)
            rows.append((f"– {title}", *counts, f"{named[1] - named[0]:+}"))
    return rows


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table, aligned for the eye too; the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def read_report(path: Path) -> dict[str, Any]:
    """The report of a run, with what `cost` shows."""
    report = read_json(path)
    needed = ("trainable_parameters", "total_parameters", "tokens", "seconds", "tokens_per_second", "peak_memory_gb")
    for key in needed:
        if not isinstance(report.get(key), int | float):
            raise InputError(f"{path}: no number {key!r}; is it the report.json of a finished training run?")
    return report


def cost(report: dict[str, Any]) -> str:
    """What training took, in one sentence."""
    trained = report["trainable_parameters"]
    return (
        f"Trained {trained:,} parameters ({trained / report['total_parameters']:.1%} of the model)"
        f" on {report['tokens']:,} tokens in {report['seconds']:,.0f} s ({report['tokens_per_second']:,.0f} tokens/s),"
        f" {report['peak_memory_gb']:.1f} GB at peak."
    )


def verdict(before: Evaluation, after: Evaluation, general: str) -> str:
    """What the numbers say, in one sentence."""
    parts = []
    changes = {name: after.perplexity[name] / old - 1 for name, old in before.perplexity.items()}
    parts += [f"held-out {name} text became {harder(change)}" for name, change in changes.items() if name != general]
    if before.questions:
        parts.append(answers_verdict(before.questions["rows"], after.questions["rows"]))
    if general in changes:
        change = changes[general]
        judged = "much was" if change > 0.10 else "a little was" if change > 0.02 else "nothing was"
        parts.append(f"general text became {harder(change)}: {judged} forgotten")
    return f"Verdict: {'; '.join(parts)}."


def harder(change: float) -> str:
    """A relative change of perplexity in words."""
    if abs(change) < 0.005:
        return "neither easier nor harder to predict"
    return f"{abs(change):.0%} {'harder' if change > 0 else 'easier'} to predict"


def answers_verdict(before: dict[str, dict], after: dict[str, dict]) -> str:
    """Whether more questions are answered than before, beyond chance, and whether that is many."""
    old, new = (sum(row["contains"] > 0 for row in rows.values()) for rows in (before, after))
    change, _, _ = paired_change(before, after, "contains")
    text = f"answers went from {old} to {new} of {len(before)}, {change}"
    if new < len(before) / 2:
        text += ", so that most stay unknown: reading alone teaches the text, and few facts that a question can reach"
    change, gained, lost = paired_change(before, after, "rouge_l")
    return f"{text}; by ROUGE-L {gained} came closer to the expected answer and {lost} moved away, {change}"


def paired_change(before: dict[str, dict], after: dict[str, dict], measure: str) -> tuple[str, int, int]:
    """What the sign test says of a measure of the same questions; how many of them rose in it and how many fell."""
    gained = sum(before[name][measure] < after[name][measure] for name in before)
    lost = sum(before[name][measure] > after[name][measure] for name in before)
    p = sign_test(gained, lost)
    change = "no change beyond chance" if p > 0.05 else "a real gain" if gained > lost else "a real loss"
    return f"{change} (p = {p:.2g})", gained, lost


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact p-value that `gained` and `lost` are equally likely (McNemar's test on paired answers)."""
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1)) / 2**changed
    return min(1.0, 2 * tail)


if __name__ == "__main__":
    run(main)
