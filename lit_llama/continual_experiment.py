"""A continual-learning experiment: its tasks, strategies, orders and seeds, the runs they make, and what they train on.

What a strategy does, and how a run is carried out, is `continual.py`'s.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_llama.checkpoint import existing_directory
from lit_llama.config import Embeddings, Quantization
from lit_llama.data.corpus import CorpusOptions, prepare_corpus
from lit_llama.data.instructions import InstructionOptions, prepare_instructions
from lit_llama.data.mixing import MixedWindows
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore
from lit_llama.errors import InputError
from lit_llama.evaluation.questions import read_questions
from lit_llama.experiment_runs import Run, RunOptions
from lit_llama.lora import LoRAConfig
from lit_llama.prompts import STYLES
from lit_llama.run_files import plain_arguments
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import EvalConfig, TrainConfig

STRATEGIES = ("sequence", "replay", "generative", "merge", "o-lora", "isolated", "joint")
OPTIONS = {"replay": "replay_ratio", "generative": "replay_ratio", "o-lora": "orthogonality"}
"""Of those strategies that have one, the option."""
ISOLATED, JOINT = "isolated", "joint"
ONCE = (ISOLATED, JOINT)
"""Strategies whose result does not depend on the order of the tasks."""
BASE = "base"
"""Name of the control: the base alone."""
RESULT = "result.json"


@dataclass(kw_only=True)
class ContinualExperiment(RunOptions):
    """Learn tasks one after the other, by several strategies, in several orders, and measure what is forgotten."""

    checkpoint_dir: Path
    """The base model."""
    tasks: list[dict[str, Any]]
    """Each {name: ..., question_file: closed-book questions (JSONL), and to train on one or more of data_dir: a token
    store or a list of them, documents: a folder, instruction_file: JSONL}, and if wanted val_data_dir: a token store
    whose part "val" is scored (by default that of data_dir, or else what is trained on), tokens: to train on."""
    orders: list[list[str]] = field(default_factory=list)
    """Names of the tasks in the order of learning, for each order to try; by default one, that of `tasks`."""
    strategies: list[str | dict[str, Any]] = field(default_factory=lambda: list(STRATEGIES))
    """sequence, replay, generative, merge, o-lora, isolated, joint; or {name: replay, replay_ratio: 0.05, label: NAME
    IN THE REPORT}."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each draws the order of the data and the adapters' first values anew."""
    tokens: int | None = None
    """Tokens of its own that a task is trained on; by default train.epochs passes over its data."""
    replay_ratio: float = 0.2
    """replay, generative: share of a task's training that is of earlier tasks; 0.2 is 1 : 4. It comes on top."""
    orthogonality: float = 0.5
    """o-lora: weight of its penalty, lambda_1 of the paper."""
    metric: Literal["exact_match", "f1", "contains"] = "exact_match"
    """What accuracy is."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=3, learning_rate=2e-4))
    eval: EvalConfig = field(default_factory=EvalConfig)
    quantize: Quantization | None = None
    """Keep the frozen base in 4 bits (nf4, nf4-dq, int4) or 8 bits (int8); merge writes it unquantized."""
    embeddings: Embeddings | None = None
    """Embedding and head in 8 bits (int8), or the embedding in the host's memory (cpu)."""
    precision: str = "bf16"
    """Precision of the base weights and the computation: bf16 or fp32."""
    out: Path | None = None
    """Carry out the one run that the other options leave, in this process, and write its result here: how the
    experiment calls itself."""
    first_tasks: Path | None = None
    """For that run: folder of the isolated adapters of its seed. The first of a sequence is the same, and taken."""


class Strategy(NamedTuple):
    """One way to learn the tasks: its name in the report, which one it is, and its options."""

    label: str
    name: str
    replay_ratio: float
    orthogonality: float


class Task(NamedTuple):
    """What is learned at one time."""

    name: str
    question_file: Path
    data_dirs: tuple[Path, ...] = ()
    documents: Path | None = None
    instruction_file: Path | None = None
    val_data_dir: Path | None = None
    tokens: int | None = None


# --- what an experiment is


def tasks_of(experiment: ContinualExperiment) -> dict[str, Task]:
    """The tasks by name.

    Raises:
        InputError: an entry with an unknown key, without a name, questions or data, or with a name that is taken.
    """
    keys = ("name", "question_file", "data_dir", "documents", "instruction_file", "val_data_dir", "tokens")
    found: dict[str, Task] = {}
    for number, entry in enumerate(experiment.tasks, start=1):
        place = f"tasks, entry {number}"
        _refuse_unknown(place, entry, keys)
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise InputError(f"{place}: name {name!r} must be letters, digits and _ . + -, to name a folder")
        if name in found:
            raise InputError(f"{place}: another task is called {name!r}; rename one")
        given = entry.get("data_dir") or []
        paths = {key: Path(entry[key]) if entry.get(key) else None for key in keys[3:6]}
        if not entry.get("question_file"):
            raise InputError(f"task {name!r}: no question_file, to measure what is forgotten")
        if not (given or paths["documents"] or paths["instruction_file"]):
            raise InputError(f"task {name!r}: nothing to train on; give data_dir, documents or instruction_file")
        data_dirs = tuple(map(Path, [given] if isinstance(given, str | Path) else given))
        found[name] = Task(name, Path(entry["question_file"]), data_dirs, tokens=entry.get("tokens"), **paths)
    return found


def strategies_of(experiment: ContinualExperiment) -> list[Strategy]:
    """The strategies, each with its own options or the experiment's.

    Raises:
        InputError: an unknown strategy or key, an option out of range, or a label that is there twice.
    """
    found: list[Strategy] = []
    for number, entry in enumerate(experiment.strategies, start=1):
        entry = {"name": entry} if isinstance(entry, str) else entry
        _refuse_unknown(f"strategies, entry {number}", entry, ("name", "label", "replay_ratio", "orthogonality"))
        name = entry.get("name")
        if name not in STRATEGIES:
            raise InputError(f"strategies, entry {number}: {name!r} is none of {', '.join(STRATEGIES)}")
        strategy = Strategy(
            entry.get("label", name),
            name,
            float(entry.get("replay_ratio", experiment.replay_ratio)),
            float(entry.get("orthogonality", experiment.orthogonality)),
        )
        if not 0 < strategy.replay_ratio < 1 or strategy.orthogonality < 0:
            raise InputError(
                f"strategy {strategy.label!r}: replay_ratio {strategy.replay_ratio} must lie between 0 and 1, and"
                f" orthogonality {strategy.orthogonality} be at least 0"
            )
        if strategy.label in [BASE, *(other.label for other in found)]:
            raise InputError(f'strategies: {strategy.label!r} is there twice or taken; give it another "label"')
        found.append(strategy)
    return found


def orders_of(experiment: ContinualExperiment) -> list[list[str]]:
    """The orders of the tasks' names."""
    return experiment.orders or [list(tasks_of(experiment))]


def _refuse_unknown(place: str, entry: Any, known: Sequence[str]) -> None:
    unknown = [key for key in entry if key not in known] if isinstance(entry, dict) else [str(entry)]
    if unknown:
        raise InputError(f"{place}: {unknown[0]!r} is none of the keys {', '.join(known)}")


def check(experiment: ContinualExperiment) -> None:
    """Raise InputError where an experiment cannot be carried out as it is written; nothing is written before."""
    tokenizer = Tokenizer.from_checkpoint(existing_directory(experiment.checkpoint_dir))
    tasks, strategies, lora = tasks_of(experiment), strategies_of(experiment), experiment.lora
    if len(tasks) < 2:
        raise InputError("tasks: at least two are needed, to forget one while learning the other")
    for order in orders_of(experiment):
        if sorted(order) != sorted(tasks):
            raise InputError(f"orders: {', '.join(order)} does not name each of the tasks {', '.join(tasks)} once")
        if experiment.orders.count(order) > 1:
            raise InputError(f"orders: {', '.join(order)} is there twice")
    if not strategies or not experiment.seeds or len(set(experiment.seeds)) < len(experiment.seeds):
        raise InputError("strategies and seeds: at least one of each is needed, and no seed twice")
    if experiment.train.max_steps is not None or not experiment.train.packed:
        raise InputError("tasks are as long as tokens or train.epochs say, and packed: leave out max_steps and packed")
    if lora.init != "kaiming":
        raise InputError(f"lora.init {lora.init}: an adapter that is trained on must start as it is stored: kaiming")
    if (lora.dora or lora.modules_to_save) and any(strategy.name == "o-lora" for strategy in strategies):
        raise InputError("o-lora stacks plain low-rank updates: leave out lora.dora, lora.modules_to_save or o-lora")
    if experiment.eval.probe_style not in (None, *STYLES):
        raise InputError(f"eval.probe_style {experiment.eval.probe_style!r} is none of {', '.join(STYLES)}")
    for task in tasks.values():
        read_questions(task.question_file)
        for path in (task.documents, task.instruction_file):
            if path is not None and not path.exists():
                raise InputError(f"task {task.name!r}: {path} does not exist")
        if task.tokens is not None and (not isinstance(task.tokens, int) or task.tokens < 1):
            raise InputError(f"task {task.name!r}: tokens {task.tokens!r} must be a whole number above 0")
        if task.data_dirs:
            train_windows(experiment, task, tokenizer, seed=0)
            held_out_windows(experiment, task, tokenizer)


def prepare(experiment: ContinualExperiment) -> ContinualExperiment:
    """The experiment with documents and instruction files as token stores, which are kept under `out_dir/data`.

    Their names tell their content, so that a file that has changed is prepared anew.
    """
    tokenizer = Tokenizer.from_checkpoint(experiment.checkpoint_dir)
    checkpoint_dir, style, system = experiment.checkpoint_dir, experiment.eval.probe_style, experiment.eval.probe_system
    length = experiment.train.sequence_length + 1
    entries = []
    for task in tasks_of(experiment).values():
        data_dirs = list(task.data_dirs)
        if task.documents is not None:
            data_dirs.append(experiment.out_dir / "data" / f"{task.name}-{_digest(task.documents, tokenizer.sha256)}")
            if not data_dirs[-1].exists():
                options = CorpusOptions(checkpoint_dir, near_duplicate_threshold=None)
                prepare_corpus([task.documents], data_dirs[-1], options, val_fraction=0, workers=1)
        if task.instruction_file is not None:
            key = _digest(task.instruction_file, tokenizer.sha256, str(style), str(system), str(length))
            data_dirs.append(experiment.out_dir / "data" / f"{task.name}-{key}")
            if not data_dirs[-1].exists():
                options = InstructionOptions(checkpoint_dir, style, system, max_length=length)
                prepare_instructions([task.instruction_file], data_dirs[-1], options, val_fraction=0)
        paths = {"question_file": task.question_file, "data_dir": data_dirs, "val_data_dir": task.val_data_dir}
        entries.append(plain_arguments({"name": task.name, **paths, "tokens": task.tokens}))
    return replace(experiment, tasks=entries)


def _digest(source: Path, *settings: str) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if path.is_file():
            digest.update(str(path.relative_to(source)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def planned_runs(experiment: ContinualExperiment) -> tuple[list[Run], list[Run]]:
    """The base alone and what does not depend on the order, each once; then every strategy, order and seed."""
    orders = orders_of(experiment)
    once = [_run(experiment, BASE, None, orders[0], 0)]
    each = []
    for strategy in strategies_of(experiment):
        for seed in experiment.seeds:
            if strategy.name in ONCE:
                once.append(_run(experiment, f"{strategy.label}.seed{seed}", strategy, orders[0], seed))
                continue
            for number, order in enumerate(orders, start=1):
                each.append(_run(experiment, f"{strategy.label}.order{number}.seed{seed}", strategy, order, seed))
    return once, each


def _run(experiment: ContinualExperiment, name: str, strategy: Strategy | None, order: list[str], seed: int) -> Run:
    """A run that is known again by the options which its result depends on."""
    chosen = []
    if strategy is not None:
        kept = ("label", "name", OPTIONS.get(strategy.name))
        chosen = [{key: value for key, value in strategy._asdict().items() if key in kept}]
    isolated = [other.label for other in strategies_of(experiment) if other.name == ISOLATED]
    starts_alone = strategy is not None and strategy.name not in ONCE and isolated
    only = replace(
        experiment,
        orders=[order],
        strategies=chosen,
        seeds=[seed],
        first_tasks=experiment.out_dir / "runs" / f"{isolated[0]}.seed{seed}" if starts_alone else None,
    )
    free = ("devices", "threads", "action", "overwrite", "out", "metric", *OPTIONS.values())
    given = {key: value for key, value in plain_arguments(only).items() if value is not None and key not in free}
    arguments = [(f"--{key}", value if isinstance(value, str) else json.dumps(value)) for key, value in given.items()]
    evaluations = {RESULT: tuple(text for pair in arguments for text in pair)}
    return Run(name, BASE if strategy is None else strategy.label, None, seed, {"order": order}, None, evaluations)


# --- what is trained and scored


def train_windows(
    experiment: ContinualExperiment, task: Task, tokenizer: Tokenizer, seed: int
) -> dict[str, TrainingWindows]:
    """The windows of a task's stores, by their directories."""
    stores = {str(path): TokenStore.open(path, "train", tokenizer.sha256) for path in task.data_dirs}
    return {name: TrainingWindows(store, experiment.train.sequence_length, seed) for name, store in stores.items()}


def held_out_windows(experiment: ContinualExperiment, task: Task, tokenizer: Tokenizer) -> MixedWindows:
    """What a task's loss is measured on: held-out text where there is some, else what is trained on."""
    if task.val_data_dir is not None:
        stores = [TokenStore.open(task.val_data_dir, "val", tokenizer.sha256)]
    else:
        opened = [TokenStore.open(path, "train", tokenizer.sha256) for path in task.data_dirs]
        with_val = [store for store in opened if "val" in store.meta["splits"]]
        stores = [TokenStore.open(store.data_dir, "val") for store in with_val] or opened
    length = experiment.train.sequence_length
    windows = {str(store.data_dir): TrainingWindows(store, length, seed=0, shuffle=False) for store in stores}
    return mixed([(windows, size_of(windows))], seed=0)


def mixed(parts: Sequence[tuple[Mapping[str, TrainingWindows], float]], seed: int) -> MixedWindows:
    """One course of several groups of stores, so many tokens of each; a group's stores share them by their size."""
    sources, tokens = {}, {}
    for number, (windows, wanted) in enumerate(parts):
        for name, own in windows.items():
            sources[f"{number} {name}"] = own
            tokens[f"{number} {name}"] = wanted * size_of({name: own}) / size_of(windows)
    total = sum(tokens.values())
    return MixedWindows(sources, [(total, {name: count / total for name, count in tokens.items()})], seed)


def size_of(windows: Mapping[str, TrainingWindows]) -> float:
    """Training pairs of one pass over the stores."""
    return sum(own.domain_windows * own.tokens_per_window for own in windows.values())
