"""Comparing ways to inject knowledge: what an experiment is, which runs it has, and in which order.

A run trains one recipe with one learner at one seed (`finetune/inject.py`) and asks the result closed-book
(`scripts/evaluate_knowledge.py`); a control asks the base alone. Besides what all runs write (`experiment_runs`, which
carries them out), there lie in `out_dir/runs/NAME/`:

    trained/          what training wrote; trained-examples/ what it trained on
    evaluation.json   what it was asked and answered (open_book.json: with the document before its eyes)

Options are chosen on the questions of split "validation" at the first seed, before any other seed is trained. What the
runs measured is gathered in `comparison_results`, and shown by `comparison_report`.
"""

import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_llama.errors import InputError
from lit_llama.evaluation.questions import read_questions
from lit_llama.experiment_runs import Run, RunOptions, Scripts, directory, execute, is_finished
from lit_llama.files import read_json, read_yaml

HEADLINE, VALIDATION = "injected", "validation"
"""Splits of questions: what the experiment measures, and what options are chosen by."""
RAW, QUESTIONS_ONLY = "raw", "qa-only"
"""Recipes that every experiment has, as controls."""
CONTEXTS = {"base": "none", "base, document shown": "oracle", "base, BM25 retrieval": "bm25"}
"""What the base alone is asked with, by the control's name."""


@dataclass(kw_only=True)
class Experiment(RunOptions):
    """Which recipes are tried on which documents, with what, and how the results are measured."""

    checkpoint_dir: Path
    """The base model."""
    documents: Path
    """Folder of the documents to inject."""
    question_file: Path
    """Questions to evaluate on, with splits, made by scripts/prepare_questions.py."""
    recipes: list[str | dict[str, Any]]
    """Names, or {name: permute+qa, options: {permute.views: 5}, label: NAME IN THE REPORT}."""
    tokens: int
    """Tokens that each run trains on."""
    learners: dict[str, dict[str, Any]] = field(default_factory=lambda: {"lora": {"learner": "lora"}})
    """By name {learner: lora or full, any option of finetune/inject.py}; a list of values is a choice to make.
    recipes: [...] lets a learner try those only."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each draws views, order and initial values anew; options are chosen at the first."""
    best: int | None = None
    """Train further seeds of so many of a learner's recipes only, those that answer most of the validation questions
    at the first seed, and of the controls; by default of all."""
    facts_file: Path | None = None
    templates_file: Path | None = None
    train_questions: Path | None = None
    """Questions to train on, of documents whose split is "taught"."""
    replay_dir: Path | None = None
    """Token store of other text, for recipes with replay."""
    data_dirs: dict[str, Path] = field(default_factory=dict)
    """Token stores to measure bits per byte on: {domain: ..., general: ...}."""
    training_options: dict[str, Any] = field(default_factory=dict)
    """Further options of finetune/inject.py, for every run."""
    evaluation_options: dict[str, Any] = field(default_factory=dict)
    """Further options of scripts/evaluate_knowledge.py."""
    metric: Literal["exact_match", "f1", "contains"] = "exact_match"
    cell: str = "direct/unseen"
    """Form and phrasing of the questions that count."""
    selection_recipe: str | None = None
    """Choose a learner's options by this recipe for all of them, instead of for each recipe by itself."""
    open_book: bool = False
    """Ask each trained model a second time, with the document shown: did it keep the ability to read?"""


class RecipeEntry(NamedTuple):
    """A recipe of the experiment: its name in the report, what inject.py calls it, and its options."""

    label: str
    name: str
    options: dict[str, Any]


def check_keys(path: Path) -> None:
    """Raise InputError where an experiment file has a key that there is not; names it and the nearest one."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, as in checkpoint_dir: ...")
    _refuse_unknown(f"{path}", content, [item.name for item in fields(Experiment)])


def check(experiment: Experiment) -> None:
    """Raise InputError where an experiment cannot be carried out as it is written; names the key."""
    for key in ("checkpoint_dir", "documents", "facts_file", "templates_file", "train_questions", "replay_dir"):
        path = getattr(experiment, key)
        if path is not None and not path.exists():
            raise InputError(f"{key}: {path} does not exist")
    for name, path in experiment.data_dirs.items():
        if not path.exists():
            raise InputError(f"data_dirs, {name}: {path} does not exist")
    if experiment.tokens < 1:
        raise InputError(f"tokens must be positive, not {experiment.tokens}")
    for key in ("seeds", "devices", "recipes", "learners"):
        if not getattr(experiment, key):
            raise InputError(f"{key}: at least one is needed")
    if len(set(experiment.seeds)) < len(experiment.seeds):
        raise InputError(f"seeds: {experiment.seeds} has one twice")
    for name, entry in experiment.learners.items():
        if entry.get("learner", name) not in ("lora", "full"):
            raise InputError(f'learners, {name}: needs "learner: lora" or "learner: full"')
        if any(isinstance(value, list) and not value for value in entry.values()):
            raise InputError(f"learners, {name}: an empty list leaves no value to choose")
    if experiment.best is not None and experiment.best < 1:
        raise InputError(f"best must be positive, not {experiment.best}")
    labels = [recipe.label for recipe in recipes(experiment)]
    for name, entry in experiment.learners.items():
        unknown = [label for label in entry.get("recipes", ()) if label not in labels]
        if unknown:
            raise InputError(f"learners, {name}: recipe {unknown[0]!r} is none of {', '.join(labels)}")
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f'recipes: {label!r} is there twice; give one of them another "label"')
    if experiment.selection_recipe not in (None, *labels):
        raise InputError(f"selection_recipe: {experiment.selection_recipe!r} is none of {', '.join(labels)}")
    cells = {(row.get("split"), _cell(row)) for row in read_questions(experiment.question_file)}
    if (HEADLINE, experiment.cell) not in cells:
        there = ", ".join(sorted(cell for split, cell in cells if split == HEADLINE)) or "none"
        raise InputError(
            f'{experiment.question_file}: no question of split "{HEADLINE}" is {experiment.cell!r} (there: {there}):'
            " set cell to what is to count"
        )
    choices = experiment.best is not None or any(len(_grid(entry)) > 1 for entry in experiment.learners.values())
    if choices and (VALIDATION, experiment.cell) not in cells:
        raise InputError(
            f'{experiment.question_file}: no question of split "{VALIDATION}" is {experiment.cell!r}, by which options'
            " with several values and the best recipes are chosen: give each option one value and leave out best, or"
            " add such questions"
        )


def _refuse_unknown(place: str, mapping: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in mapping:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise InputError(f"{place}: {key!r} is no key here; did you mean {nearest!r}?")


# --- planning


def recipes(experiment: Experiment) -> list[RecipeEntry]:
    """The recipes of an experiment, the controls among them: raw text, and questions alone where there are some.

    Raises:
        InputError: an entry without name, or with another key than name, options and label.
    """
    entries = []
    for number, entry in enumerate(experiment.recipes, start=1):
        entry = {"name": entry} if isinstance(entry, str) else entry
        _refuse_unknown(f"recipes, entry {number}", entry, ("name", "options", "label"))
        name, options = entry.get("name"), entry.get("options") or {}
        if not isinstance(name, str) or not isinstance(options, dict):
            raise InputError(f"recipes, entry {number}: expected {{name: ..., options: {{...}}}}")
        entries.append(RecipeEntry(entry.get("label", name), name, options))
    controls = [RAW, QUESTIONS_ONLY] if experiment.train_questions else [RAW]
    labels = [entry.label for entry in entries]
    return [RecipeEntry(name, name, {}) for name in controls if name not in labels] + entries


def recipes_of(experiment: Experiment, learner: str) -> list[RecipeEntry]:
    """The recipes that a learner tries."""
    wanted = experiment.learners[learner].get("recipes")
    return [entry for entry in recipes(experiment) if wanted is None or entry.label in wanted]


def controls(experiment: Experiment) -> list[Run]:
    """The base alone: closed-book, with the right document shown, and with the one that BM25 finds."""
    return [
        Run(f"base.{context}", name, None, None, {}, None, {"evaluation.json": _evaluation(experiment, context)})
        for name, context in CONTEXTS.items()
    ]


def sweep(experiment: Experiment, recipe: RecipeEntry, learner: str) -> list[Run]:
    """A run at the first seed for each way to choose the learner's options."""
    first = experiment.seeds[0]
    return [_run(experiment, recipe, learner, options, first) for options in _grid(experiment.learners[learner])]


def _grid(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    options = {key: value for key, value in entry.items() if key not in ("learner", "recipes")}
    options = {key: value if isinstance(value, list) else [value] for key, value in options.items()}
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def _run(experiment: Experiment, recipe: RecipeEntry, learner: str, options: dict[str, Any], seed: int) -> Run:
    entry = experiment.learners[learner]
    choices = [key for key in options if isinstance(entry[key], list) and len(entry[key]) > 1]
    chosen = [f"{key.rpartition('.')[2]}={_text(options[key])}" for key in choices]
    name = ".".join([recipe.label, learner, *chosen, f"seed{seed}"])
    name = "".join(letter if letter.isalnum() or letter in "+-=._" else "_" for letter in name)
    trained, kind = experiment.out_dir / "runs" / name / "trained", entry.get("learner", learner)
    given = {
        "checkpoint_dir": experiment.checkpoint_dir,
        "documents": experiment.documents,
        "recipe": recipe.name,
        "learner": kind,
        "out_dir": trained,
        "tokens": experiment.tokens,
        "facts_file": experiment.facts_file,
        "templates_file": experiment.templates_file,
        "question_file": experiment.train_questions,
        "replay.data_dir": experiment.replay_dir,
        "cache_dir": experiment.out_dir / "cache",
        "seed": seed,
        **{f"recipes.{key}": value for key, value in recipe.options.items()},
        **experiment.training_options,
        **options,
        "train.seed": seed,
    }
    contexts = {"evaluation.json": "none", **({"open_book.json": "oracle"} if experiment.open_book else {})}
    evaluations = {file: _evaluation(experiment, context, trained, kind) for file, context in contexts.items()}
    return Run(name, recipe.label, learner, seed, options, _arguments(given), evaluations)


def _evaluation(
    experiment: Experiment, context: str, trained: Path | None = None, learner: str | None = None
) -> tuple[str, ...]:
    base = experiment.checkpoint_dir
    model: dict[str, Path | None] = {"checkpoint_dir": base, "adapter_dir": trained}
    if learner == "full" and trained is not None:
        model = {"checkpoint_dir": trained / "checkpoint", "base_dir": base}
    # With a document shown only answers count; texts were measured without.
    stores = {name: str(path) for name, path in experiment.data_dirs.items()} if context == "none" else None
    return _arguments(
        {
            **model,
            "question_file": experiment.question_file,
            "documents": experiment.documents,
            "facts_file": experiment.facts_file,
            "data_dirs": stores or None,
            "context": context,
            **experiment.evaluation_options,
        }
    )


def _arguments(values: Mapping[str, Any]) -> tuple[str, ...]:
    given = {name: value for name, value in values.items() if value is not None}
    return tuple(text for name, value in given.items() for text in (f"--{name}", _text(value)))


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | list | dict) else str(value)


# --- carrying out


def carry_out(experiment: Experiment, scripts: Scripts) -> list[Run]:
    """Carry out all runs that are not finished yet, those that choose options first; with action "report", none.

    Returns:
        The runs that the report is about: controls, and of each recipe and learner the chosen options at every seed
        that it is trained at; of those whose every attempt to choose failed, the attempts.

    Raises:
        InputError: a run of an earlier call had other options, and `overwrite` is not set.
    """
    sweeps = first_wave(experiment)
    runs, attempted = controls(experiment), list(itertools.chain(*sweeps.values()))
    execute(experiment, scripts, runs + attempted)
    first: dict[str, list[tuple[RecipeEntry, Run]]] = {}
    for learner in experiment.learners:
        first[learner] = []
        for entry in recipes_of(experiment, learner):
            best = choose(experiment, sweeps[experiment.selection_recipe or entry.label, learner])
            if best is None:
                runs += sweep(experiment, entry, learner)
            else:
                first[learner].append((entry, _run(experiment, entry, learner, best.options, experiment.seeds[0])))
    at_first = [run for tried in first.values() for _, run in tried]
    execute(experiment, scripts, [run for run in at_first if run not in attempted])
    further = [
        _run(experiment, entry, learner, run.options, seed)
        for learner, tried in first.items()
        for entry, run in _most_promising(experiment, tried)
        for seed in experiment.seeds[1:]
    ]
    execute(experiment, scripts, further)
    return runs + at_first + further


def first_wave(experiment: Experiment) -> dict[tuple[str, str], list[Run]]:
    """The runs at the first seed that options are chosen by, of each (recipe, learner)."""
    by = experiment.selection_recipe
    return {
        (entry.label, name): sweep(experiment, entry, name)
        for name in experiment.learners
        for entry in (recipes(experiment) if by else recipes_of(experiment, name))
        if by in (None, entry.label)
    }


def _most_promising(experiment: Experiment, tried: list[tuple[RecipeEntry, Run]]) -> list[tuple[RecipeEntry, Run]]:
    """Of a learner's recipes and their runs at the first seed those that are trained at the others as well."""
    if experiment.best is None:
        return tried
    scores = {
        entry.label: score
        for entry, run in tried
        if entry.label not in (RAW, QUESTIONS_ONLY) and (score := validation_score(experiment, run)) is not None
    }
    best = sorted(scores, key=scores.get, reverse=True)[: experiment.best]
    return [pair for pair in tried if pair[0].label in (RAW, QUESTIONS_ONLY, *best)]


def choose(experiment: Experiment, attempts: Sequence[Run]) -> Run | None:
    """The attempt with the best answers on the validation split, the earlier of equals; None if all failed."""
    if len(attempts) == 1:
        return attempts[0]
    scores = [(score, run) for run in attempts if (score := validation_score(experiment, run)) is not None]
    return max(scores, key=lambda scored: scored[0])[1] if scores else None


def validation_score(experiment: Experiment, run: Run) -> float | None:
    """Share of the validation questions that a run answers; None where it did not finish."""
    if not is_finished(experiment, run):
        return None
    path = directory(experiment, run) / "evaluation.json"
    found = cell_scores(read_json(path)["rows"], VALIDATION, experiment.cell, experiment.metric)
    if not found:
        raise InputError(f'{path}: no question of split "{VALIDATION}" was asked, to choose by: ask more')
    return sum(found) / len(found)


# --- reading


def cell_scores(rows: Sequence[Mapping[str, Any]], split: str, cell: str, metric: str) -> list[float]:
    """The metric of each question of a split, form and phrasing, in their order."""
    return [float(row[metric]) for row in cell_rows(rows, split, cell)]


def cell_rows(rows: Sequence[Mapping[str, Any]], split: str, cell: str) -> list[Mapping[str, Any]]:
    """The rows of an evaluation that are of a split, form and phrasing, by id."""
    return sorted(
        (row for row in rows if (row.get("split"), _cell(row)) == (split, cell)), key=lambda row: str(row["id"])
    )


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row.get('form', 'direct')}/{row.get('phrasing', 'unseen')}"
