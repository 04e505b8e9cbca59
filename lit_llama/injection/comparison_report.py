"""report.md and report.html of a comparison: the verdict first, then tables, charts, answers, failures and settings.

Both show the same tables. The page is one file without scripts or anything from elsewhere. What its numbers are is
decided in `comparison_results`, how its charts are drawn in `comparison_charts`.
"""

from collections.abc import Sequence
from dataclasses import fields
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_llama.evaluation.statistics import Estimate
from lit_llama.files import atomic_file, read_json
from lit_llama.injection import comparison_charts as charts
from lit_llama.injection.comparison import HEADLINE, QUESTIONS_ONLY, RAW, VALIDATION, Experiment, cell_rows
from lit_llama.injection.comparison_results import (
    BASE_METRIC,
    Arm,
    Results,
    bits_per_byte,
    count,
    duration,
    percent,
    verdict,
)
from lit_llama.tracking import read_metrics

METRICS = {"exact_match": "exact match", "f1": "F1", "contains": "answer named"}
SPLITS = {
    "injected": "injected, no question trained",
    "taught": "injected, questions trained",
    "never": "never injected",
    "known": "known before",
}
CURVES = {
    "val_loss": "Held-out loss of the documents",
    "general_loss": "Loss of general text",
    "probe_accuracy": "Probe questions answered",
}
EXAMPLES = (("winner right, raw wrong", 5), ("both right", 1), ("raw right, winner wrong", 2), ("both wrong", 3))


class Table(NamedTuple):
    """A table of texts; the first column names its rows."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Answers(NamedTuple):
    """A question with what each model said, and whether it was right."""

    kind: str
    question: str
    expected: str
    said: Sequence[tuple[str, str, bool]]


def write_report(results: Results, command: str) -> None:
    """Write both files into the experiment's out_dir, replacing those of an earlier call.

    Args:
        command: that made the report, to be repeated.
    """
    experiment = results.experiment
    with atomic_file(experiment.out_dir / "report.md") as file:
        file.write(markdown(results, command))
    with atomic_file(experiment.out_dir / "report.html") as file:
        file.write(html(results, command))


# --- what is shown


def title(experiment: Experiment) -> str:
    return f"Knowledge injection into {experiment.checkpoint_dir.name}"


def subtitle(results: Results) -> str:
    experiment = results.experiment
    return (
        f"{len({arm.recipe for arm in results.arms})} recipes, {', '.join(experiment.learners)},"
        f" {len(experiment.seeds)} seed{'s' * (len(experiment.seeds) > 1)}, {experiment.tokens:,} tokens each;"
        f" measured closed-book on {len(results.entities)} questions about {len(set(results.entities))} documents that"
        " were injected and never asked about in training"
    )


def main_table(results: Results) -> Table:
    """Every arm: the headline, its difference to raw text, the other splits, forgetting and cost."""
    experiment = results.experiment
    metric, cell = experiment.metric, experiment.cell

    def named(arm: Arm) -> list[str]:
        return [] if metric == BASE_METRIC else [percent(arm.cell(HEADLINE, cell, BASE_METRIC))]

    rows = []
    for arm in results.arms:
        signs = {"better": " ▲", "worse": " ▼", "": " ="}
        gain = "" if arm.gain is None else _points(arm.gain) + signs[arm.mark]
        known = None
        if results.base is not None:
            before, after = (one.cell("known", cell, BASE_METRIC) for one in (results.base, arm))
            known = None if before is None or after is None else after - before
        rows.append(
            [
                f"{arm.recipe}, {arm.learner}",
                _with_interval(arm.headline),
                gain or ("(compared with)" if arm.recipe == RAW else "no raw run"),
                *named(arm),
                percent(arm.cell("taught", cell, metric)),
                percent(arm.cell("never", cell, metric)),
                "–" if known is None else f"{100 * known:+.1f}",
                *(
                    _signed(arm.mean(lambda row, text=text: results.text_change(row, text)))
                    for text in experiment.data_dirs
                ),
                _shown(arm.cost("seconds"), duration),
                _shown(arm.cost("trainable_parameters"), count),
                *([f"{len(arm.finished)} of {len(arm.rows)}"] if results.failed else []),
            ]
        )
    texts = [f"{text} text, bits/byte" for text in experiment.data_dirs]
    header = ["recipe, learner", f"injected: {METRICS[metric]}", "points over raw"]
    header += [*([] if metric == BASE_METRIC else [METRICS[BASE_METRIC]]), "taught", "never injected"]
    return Table(
        "All recipes",
        f"Questions: {cell.replace('/', ', ')} wording. ▲ better and ▼ worse than raw text with the same learner"
        " (paired bootstrap over seeds and documents, p < 0.05 after Holm's correction for all rows), = not settled."
        " Intervals are 95 %. Changes are against the untrained base; what it knew counts where the answer is named.",
        [*header, "known before, points", *texts, "time a run", "trained", *(["runs"] if results.failed else [])],
        rows,
    )


def cells_table(results: Results) -> Table:
    """All cells of the base, of raw text and of each learner's best arm."""
    metric = results.experiment.metric
    arms = [arm for arm in (results.base, *winners(results, with_raw=True)) if arm is not None]
    found: dict[tuple[str, str], int] = {}
    for arm in arms:
        for row in arm.finished:
            for split, cells in row["cells"].items():
                for cell, scores in cells.items():
                    found[split, cell] = scores.get("count", 0)
    order = [key for split in SPLITS for key in found if key[0] == split]
    order += [key for key in found if key[0] not in (*SPLITS, VALIDATION)]
    rows = [
        [
            f"{split}: {cell.replace('_', '-').replace('/', ', ')} wording",
            str(found[split, cell]),
            *(
                percent(a.cell(split, cell, BASE_METRIC if a is results.base or split == "known" else metric))
                for a in arms
            ),
        ]
        for split, cell in order
    ]
    return Table(
        "The winners on every kind of question",
        f"Mean {METRICS[metric]} over seeds; of the base, and of what was known before, {METRICS[BASE_METRIC]}."
        f" {'; '.join(f'{name}: {meaning}' for name, meaning in SPLITS.items())}."
        " The wording is one that training questions have, or unseen.",
        ["documents: questions", "count", *(_column(arm) for arm in arms)],
        rows,
    )


def beyond_table(results: Results) -> Table:
    """What the same arms do besides answering: recall of values, texts, distance to the base, reading."""
    arms = [arm for arm in (results.base, *winners(results, with_raw=True)) if arm is not None]
    cell, metric = results.experiment.cell, results.experiment.metric
    measures = [
        (f"value recall, {SPLITS[split]}", lambda row, split=split: _inside(row, "recall", split, "accuracy"), percent)
        for split in SPLITS
    ]
    measures.append(
        ("answers with the document shown", lambda row: _inside(row, "open_book", HEADLINE, cell, metric), percent)
    )
    texts = sorted({text for arm in arms for row in arm.finished for text in row.get("texts") or {}})
    measures += [
        (f"{text} text, bits per byte", lambda row, text=text: bits_per_byte(row, text), lambda value: f"{value:.4f}")
        for text in texts
    ]
    measures.append(("KL divergence from the base", lambda row: row.get("kl_to_base"), lambda value: f"{value:.4f}"))
    measures.append(
        ("answers on known documents as the base's", lambda row: _inside(row, "locality", "agreement"), percent)
    )
    measures += [
        (
            f"variety of answers in bits, {SPLITS[split]}",
            lambda row, split=split: _inside(row, "answer_entropy", split),
            "{:.2f}".format,
        )
        for split in SPLITS
    ]
    rows = [[name, *(_shown(arm.mean(value), form) for arm in arms)] for name, value, form in measures]
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
    return Table("The winners beyond questions", "Means over seeds.", ["", *(_column(arm) for arm in arms)], rows)


def controls_table(results: Results) -> Table:
    """The base alone, in each context, on every split."""
    cell = results.experiment.cell
    splits = [
        split
        for split in SPLITS
        if any(arm.cell(split, cell, BASE_METRIC) is not None for arm in results.controls.values())
    ]
    rows = [
        [
            arm.recipe,
            _with_interval(arm.headline),
            *(percent(arm.cell(s, cell, BASE_METRIC)) for s in splits if s != HEADLINE),
        ]
        for arm in results.controls.values()
    ]
    header = ["no training", SPLITS[HEADLINE], *(SPLITS[split] for split in splits if split != HEADLINE)]
    note = (
        "Counted is whether the answer is named, as the base answers in sentences. The document shown is the most that"
        " reading could give; raw text and questions alone are in the table above."
    )
    return Table("Controls", note, header, rows)


def failed_table(results: Results) -> Table:
    rows = [[row["run"], row["status"], row.get("error") or ""] for row in results.failed]
    return Table(
        "Runs that did not finish", "Repeat the command to try them again.", ["run", "", "what it said last"], rows
    )


def settings_table(results: Results) -> Table:
    experiment = results.experiment
    rows = []
    for item in fields(experiment):
        value = getattr(experiment, item.name)
        if value not in (None, {}, False) and item.name not in ("action", "overwrite"):
            rows.append([item.name, _plain(value)])
    for arm in results.arms:
        entry, options = experiment.learners[str(arm.learner)], arm.rows[0]["options"]
        sweeps = [key for key in options if isinstance(entry[key], list) and len(entry[key]) > 1]
        if chosen := ", ".join(f"{key} {options[key]}" for key in sweeps):
            rows.append([f"chosen for {arm.recipe}, {arm.learner}", chosen])
    hardware, versions = results.environment.get("hardware", {}), results.environment.get("versions", {})
    if hardware:
        rows.append(
            [
                "hardware",
                f"{', '.join(hardware.get('gpu') or []) or hardware.get('cpu')}, {hardware.get('cpu_count')} cores",
            ]
        )
    if versions:
        rows.append(["versions", ", ".join(f"{package} {version}" for package, version in versions.items())])
    if revision := results.environment.get("source", {}).get("git_revision"):
        rows.append(["git revision", revision])
    return Table("Settings and hardware", "", ["", ""], rows)


def winners(results: Results, with_raw: bool = False) -> list[Arm]:
    """The best arm of each learner, the best first; raw text of the winner's learner before them if asked."""
    best: dict[str | None, Arm] = {}
    for arm in results.arms:
        best.setdefault(arm.learner, arm)
    found = list(best.values())
    raw = results.raw(found[0].learner) if found else None
    return [raw, *found] if with_raw and raw is not None and raw not in found else found


def examples(results: Results) -> list[Answers]:
    """Questions that count, with the answers of the base, raw text and the winner at a seed that both finished."""
    winner, experiment = results.winner, results.experiment
    raw = winner and results.raw(winner.learner)
    if winner is None or raw is None:
        return []
    pair = next(((a, b) for a in winner.finished for b in raw.finished if a["seed"] == b["seed"]), None)
    if pair is None:
        return []
    sources = [("base", results.base.finished[0])] if results.base else []
    sources += [("raw text", pair[1])] + ([(winner.recipe, pair[0])] if winner is not raw else [])
    asked = [
        (name, cell_rows(read_json(row["evaluation"])["rows"], HEADLINE, experiment.cell)) for name, row in sources
    ]
    left = dict(EXAMPLES)
    found: dict[str, list[Answers]] = {kind: [] for kind in left}
    for rows in zip(*(rows for _, rows in asked), strict=True):
        said = [
            (name, row["answer"], bool(row[BASE_METRIC if name == "base" else experiment.metric] > 0.5))
            for (name, _), row in zip(asked, rows, strict=True)
        ]
        right, raw_right = said[-1][2], said[1 if results.base else 0][2]
        kind = {
            (True, False): "winner right, raw wrong",
            (True, True): "both right",
            (False, True): "raw right, winner wrong",
            (False, False): "both wrong",
        }[right, raw_right]
        if len(found[kind]) < left[kind]:
            found[kind].append(Answers(kind, rows[0]["question"], " / ".join(rows[0]["answers"][:2]), said))
    return [answers for kind in found.values() for answers in kind]


def tables(results: Results) -> list[Table]:
    """All tables but the settings, in order; those with rows only."""
    made = [
        main_table(results),
        cells_table(results),
        beyond_table(results),
        controls_table(results),
        failed_table(results),
    ]
    return [table for table in made if table.rows]


def _column(arm: Arm) -> str:
    return f"{arm.recipe}, {arm.learner}" if arm.learner else "base"


def _inside(row: Any, *keys: str) -> Any:
    for key in keys:
        row = (row or {}).get(key)
    return row


def _with_interval(found: Estimate) -> str:
    return f"{percent(found.value)} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def _points(found: Estimate) -> str:
    return f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _shown(value: float | None, form: Any) -> str:
    return "–" if value is None else form(value)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


# --- as Markdown


def markdown(results: Results, command: str) -> str:
    """The report for a terminal or a repository."""
    lines = [f"# {title(results.experiment)}", "", f"{subtitle(results)}.", "", "## Verdict", ""]
    first, *others = verdict(results)
    lines += [f"**{first}**", "", *(f"- {sentence}" for sentence in others), ""]
    for table in tables(results):
        lines += _markdown_table(table)
    if found := examples(results):
        lines += ["## Answers", ""]
        for answers in found:
            said = "; ".join(f"{name} {'✓' if right else '✗'} {_clip(text)}" for name, text, right in answers.said)
            lines.append(f"- {answers.question} ({answers.expected}): {said}")
        lines.append("")
    lines += [*_markdown_table(settings_table(results)), "## Reproduce", "", f"```\n{command}\n```", ""]
    return "\n".join(lines)


def _markdown_table(table: Table) -> list[str]:
    return [f"## {table.title}", "", *([table.note, ""] if table.note else []), *aligned(table), ""]


def aligned(table: Table) -> list[str]:
    """A table's lines in Markdown, its columns below each other for a terminal."""
    rows = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    return [f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:])]


def _clip(text: str, limit: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


# --- as a page


def html(results: Results, command: str) -> str:
    """The report as one page, with charts."""
    experiment = results.experiment
    first, *others = verdict(results)
    shown = tables(results)
    parts = [
        f"<h1>{escape(title(experiment))}</h1>",
        f'<p class="sub">{escape(subtitle(results))}.</p>',
        f'<section class="verdict"><p>{escape(first)}</p>',
        f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in others)}</ul></section>",
        *_section(
            "Learning, forgetting and cost",
            "Small points are runs, large ones the mean over seeds.",
            main_charts(results),
        ),
        *(_html_table(table) for table in shown if table.title == "All recipes"),
        *(_html_table(table) for table in shown if table.title != "All recipes" and "not finish" not in table.title),
        *_section("Curves over steps", "Mean over the seeds that were measured at a step.", curve_charts(results)),
        *_answers(results),
        *(_html_table(table) for table in shown if "not finish" in table.title),
        _html_table(settings_table(results)),
        f"<h2>Reproduce</h2><pre>{escape(command)}</pre>",
    ]
    style = (files("lit_llama.injection") / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title(experiment))}</title>\n<style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _section(heading: str, note: str, figures: Sequence[str]) -> list[str]:
    if not figures:
        return []
    return [f'<h2>{escape(heading)}</h2><p class="note">{escape(note)}</p><div class="charts">{"".join(figures)}</div>']


def _tiles(results: Results, winner: Arm) -> str:
    """The winner's figures, large."""
    gain, change = winner.gain, winner.mean(lambda row: results.text_change(row, "general"))
    tiles = [
        (percent(winner.headline.value), "answered closed-book", winner.name),
        *(
            [(f"{100 * gain.value:+.1f}", "points over raw text", f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}")]
            if gain
            else []
        ),
        *([(f"{change:+.3f}", "bits per byte, general text", "more is forgetting")] if change is not None else []),
        *(
            [(duration(seconds), "a run", f"{results.experiment.tokens:,} tokens")]
            if (seconds := winner.cost("seconds"))
            else []
        ),
    ]
    only = next((arm for arm in results.arms if (arm.recipe, arm.learner) == (QUESTIONS_ONLY, winner.learner)), None)
    if only is not None:
        tiles.append((percent(only.headline.value), "questions without documents", "what their form alone gives"))
    if results.base is not None:
        shown = results.controls.get("oracle")
        with_document = f"{percent(shown.headline.value)} with the document shown" if shown else ""
        tiles.append((percent(results.base.headline.value), "named by the untrained base", with_document))
    inner = "".join(
        f"<div><b>{escape(a)}</b><span>{escape(b)}</span><small>{escape(c)}</small></div>" for a, b, c in tiles
    )
    return f'<div class="tiles">{inner}</div>'


def main_charts(results: Results) -> list[str]:
    """Answers with intervals, learning against forgetting of each learner, and answers against time."""
    if not results.arms:
        return []
    learners = [name for name in results.experiment.learners if any(arm.learner == name for arm in results.arms)]
    order = {name: number for number, name in enumerate(dict.fromkeys(arm.recipe for arm in results.arms))}
    rows = [
        charts.IntervalRow(
            arm.recipe, order[arm.recipe], *arm.headline[:3], learners.index(str(arm.learner)),
            f"{arm.name}: {_with_interval(arm.headline)}",
        )
        for arm in sorted(results.arms, key=lambda arm: (order[arm.recipe], learners.index(str(arm.learner))))
    ]  # fmt: skip
    references = [(arm.recipe, arm.headline.value) for arm in results.controls.values()]
    answered = charts.intervals("Questions answered", rows, references, learners)
    figures = [_figure("Questions answered closed-book", answered), _tiles(results, results.arms[0])]
    percentage = "{:.0%}".format
    for name, y_title, y_form, x_title, x_form, log, point in (
        ("Learning and forgetting", "general text, change in bits per byte (up: forgotten)", "{:+.3g}".format,
         "questions answered", percentage, False, lambda row, score: (score, results.text_change(row, "general"))),
        ("Answers and cost", "questions answered", percentage, "minutes a run", "{:.3g}".format, True,
         lambda row, score: (_minutes(row), score)),
    ):  # fmt: skip
        points = {
            (arm.recipe, arm.learner): [
                found
                for row, score in zip(arm.finished, arm.scores.mean(axis=1), strict=True)
                if None not in (found := point(row, float(score)))
            ]
            for arm in results.arms
        }
        everywhere = [found for several in points.values() for found in several]
        if not everywhere:
            continue
        for learner in learners:
            series = [charts.Series(r, order[r], found) for (r, by), found in points.items() if by == learner and found]
            if len(series) > 1 or series and len(learners) == 1:  # one point alone shows less than the tables do
                xs, ys = zip(*everywhere, strict=True)
                caption = f"{name}, {learner}"
                figures.append(
                    _figure(caption, charts.scatter(caption, series, x_title, y_title, x_form, y_form, xs, ys, log))
                )
    return figures


def _minutes(row: dict[str, Any]) -> float | None:
    seconds = row["costs"].get("seconds")
    return None if seconds is None else max(seconds, 0.1) / 60


def curve_charts(results: Results) -> list[str]:
    """Each metric over the steps of training, a chart a learner."""
    order = {name: number for number, name in enumerate(dict.fromkeys(arm.recipe for arm in results.arms))}
    figures = []
    for metric, heading in CURVES.items():
        form = "{:.0%}".format if metric == "probe_accuracy" else "{:.3g}".format
        for learner in results.experiment.learners:
            series = []
            for arm in (arm for arm in results.arms if arm.learner == learner):
                values: dict[float, list[float]] = {}
                for row in arm.finished:
                    path = Path(row["evaluation"]).parent / "trained" / "metrics.csv"
                    for measured in read_metrics(path) if path.is_file() else ():
                        if np.isfinite(measured.get(metric, np.nan)):
                            values.setdefault(measured["step"], []).append(measured[metric])
                if len(values) > 1:
                    points = [(step, float(np.mean(found))) for step, found in sorted(values.items())]
                    series.append(charts.Series(arm.recipe, order[arm.recipe], points))
            if series:
                caption = f"{heading}, {learner}"
                figures.append(_figure(caption, charts.curves(caption, series, "step", count, form)))
    return figures


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    body = "".join(
        f'<tr><th scope="row">{_breakable(row[0])}</th>{"".join(f"<td>{_marked(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    wide = "" if len(table.header) > 2 and table.title != "Runs that did not finish" else ' class="texts"'
    return (
        f'<h2>{escape(table.title)}</h2>{note}<div class="scroll" tabindex="0" role="region"'
        f' aria-label="{escape(table.title)}"><table{wide}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _breakable(name: str) -> str:
    return escape(name).replace("+", "+<wbr>")


def _marked(cell: str) -> str:
    text = escape(cell)
    for sign, css in (("▲", "good"), ("▼", "bad")):
        text = text.replace(sign, f'<b class="{css}">{sign}</b>')
    return text


def _answers(results: Results) -> list[str]:
    found = examples(results)
    if not found:
        return []
    articles = []
    for answers in found:
        said = "".join(
            f'<div><dt>{escape(name)}</dt><dd class="{"right" if right else "wrong"}">{"✓" if right else "✗"}'
            f" {escape(_clip(text))}</dd></div>"
            for name, text, right in answers.said
        )
        articles.append(
            f"<article><h3>{escape(answers.question)}</h3><p>{escape(answers.expected)}"
            f" <small>{escape(answers.kind)}</small></p><dl>{said}</dl></article>"
        )
    note = "The first questions of each kind by id, at the first seed; below each question the expected answer."
    return [f'<h2>Answers</h2><p class="note">{note}</p><div class="answers">{"".join(articles)}</div>']
