"""Learning task after task with LoRA: the strategies against forgetting, and one run of them.

A strategy says where a task's adapter starts and what it is trained on besides the task's own data:

    sequence     the adapter of the task before is trained on
    replay       the same, with data of the earlier tasks mixed in
    generative   the same, with data that the model writes itself, before it learns the next task
    merge        the adapters before are merged into the base, and a new one is trained on that
    o-lora       those before are frozen, and a new one beside them is kept orthogonal to them (Wang et al. 2023,
                 arXiv 2310.14152)
    isolated     a new adapter on the base; who asks must say which task it is
    joint        one adapter on all tasks at once: the upper bound, not continual at all

A run is one strategy with one order and one seed. What it writes lies in `out_dir/runs/NAME/`:

    TASK/             the adapter after this task: the directory of an ordinary training run, resumed like one
    TASK.json         what the model then knew of every task, and what the task cost
    TASK-base/        merge: the checkpoint that the adapter is on
    TASK-generated/   generative: a token store of what the model wrote of the tasks before
    result.json       all of that, once the run is done; log.txt: what it said

Which runs there are is `continual_experiment`'s, carrying out many of them `experiment_runs`'s, what they measured
`continual_report`'s.
"""

import fcntl
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lit_llama.checkpoint import load_model
from lit_llama.command_line import progress
from lit_llama.continual_experiment import (
    BASE,
    ISOLATED,
    JOINT,
    ContinualExperiment,
    Strategy,
    Task,
    held_out_windows,
    mixed,
    size_of,
    strategies_of,
    tasks_of,
    train_windows,
)
from lit_llama.data.token_store import TokenStore, TokenStoreWriter
from lit_llama.errors import InputError
from lit_llama.evaluation.knowledge import MEASURES, answer_briefly, answer_limits
from lit_llama.evaluation.perplexity import evaluate_loss
from lit_llama.evaluation.questions import encode_questions, read_questions, score_answer, spread
from lit_llama.files import read_json, write_json
from lit_llama.generation import SamplingConfig, generate
from lit_llama.hardware import run_environment
from lit_llama.learners import LoRARunArguments, lora_learner
from lit_llama.lora import load_adapter, lora_layers
from lit_llama.model import Llama
from lit_llama.packed_linear import pack_linear_layers
from lit_llama.prompts import detect_style
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, start_fabric, train

PROMPT_TOKENS = 8
"""Of an earlier task's text that is learned from its first token on, the model is given so many and writes the rest."""


class Learned(NamedTuple):
    """Where a model lies: a checkpoint, and what has been learned on it."""

    checkpoint_dir: Path
    adapter_dir: Path | None


def write_generated(
    model: Llama,
    tokenizer: Tokenizer,
    stores: Sequence[TokenStore],
    data_dir: Path,
    tokens: float,
    length: int,
    seed: int,
    batch_size: int = 16,
) -> None:
    """Let a model write about so many tokens of what it has learned, in equal parts of each store, as a token store.

    Every example begins as one of the store does, and the model goes on. Where a part of the store is not learned
    (questions), it is given that, and says what it holds most likely; where all is learned, it is given the first
    `PROMPT_TOKENS` and draws. So it takes no answer and no text of an earlier task, only how they begin. (Sun et al.
    2019, arXiv 1909.03329, let the model write the questions too, which it must have learned for that.)

    Args:
        length: most tokens of an example, less one.
        seed: of the draws.
    """
    began = time.perf_counter()
    ends = tokenizer.stop_ids | ({tokenizer.document_end_id} - {None})
    written: list[tuple[list[int], list[int]]] = []
    model.eval()
    for number, store in enumerate(stores):
        lengths = np.minimum(np.diff(store.offsets), length + 1)
        wanted = math.ceil(tokens / len(stores) / lengths.mean())
        openings = [_opening(store, document, length) for document in spread(range(store.num_documents), wanted)]
        for start in range(0, len(openings), batch_size):
            batch = openings[start : start + batch_size]
            room = length + 1 - max(len(prompt) for prompt, *_ in batch)
            limit = max(1, min(room, max(rest for _, _, rest, _ in batch)))
            drawing = batch[0][1] == 1
            sampling = SamplingConfig(temperature=float(drawing), seed=seed + number * len(openings) + start)
            answers = generate(model, [prompt for prompt, *_ in batch], limit, sampling, ends)
            for (prompt, learned, _, end), answer in zip(batch, answers, strict=True):
                if len(answer) < limit and end in ends:
                    answer = [*answer, end]
                if answer:
                    written.append((prompt + answer, [learned] * len(prompt) + [1] * len(answer)))
    if not written:
        raise InputError(f"{data_dir}: the model wrote nothing of the earlier tasks; use replay instead")
    extra = {"examples": True, "seconds": time.perf_counter() - began}
    origin = stores[0].meta["tokenizer"]["source"]
    with TokenStoreWriter(data_dir, tokenizer.vocab_size, tokenizer.sha256, origin, extra=extra) as writer:
        for ids, mask in written:
            writer.add("train", ids, mask)


def _opening(store: TokenStore, document: int, length: int) -> tuple[list[int], int, int, int]:
    """How a document begins: its first ids, whether they are learned, how many are left, and the last learned id."""
    ids, mask = (None if part is None else part[: length + 1] for part in store.document(document))
    learned = np.ones(len(ids), np.uint8) if mask is None else mask
    first = int(learned.argmax())
    shown = first or min(PROMPT_TOKENS, len(ids) - 1)
    last = int(np.flatnonzero(learned)[-1]) if learned.any() else len(ids) - 1
    return ids[:shown].tolist(), int(first == 0), max(1, last + 1 - shown), int(ids[last])


class Orthogonality:
    """O-LoRA's penalty, as `training_step.Auxiliary`: new directions are kept orthogonal to those of tasks before.

    weight * sum over layers of sum |A_before A^T|, with the entries' absolute values and of the rows of A alone
    (section 3.3 of the paper, and its published code).
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        self.layers, self.weight = [layer for _, layer in lora_layers(model)], weight

    def start_step(self, done: float) -> None:
        """Nothing changes on the way."""

    def overlap(self) -> Tensor:
        """Sum of the absolute products of the frozen rows (k, in) and the new ones (r, in), fp32 scalar."""
        pairs = [(layer.lora_A_frozen, layer.lora_A) for layer in self.layers if layer.lora_A_frozen is not None]
        return torch.stack([(before @ new.T).abs().sum() for before, new in pairs]).sum()

    def loss(self) -> Tensor:
        """What is added to the mean loss."""
        return self.weight * self.overlap()

    def before_update(self) -> None:
        """Gradients stay as they are."""


# --- one run


@contextmanager
def alone_in(place: Path) -> Iterator[None]:
    """Wait until no other process has this run in hand: of an experiment that was killed, one may go on by itself."""
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def carry_out(experiment: ContinualExperiment) -> dict[str, Any]:
    """Carry out the one run that the experiment's only order, strategy (none: the base alone) and seed make.

    What an earlier call has finished is taken as it is, and what it began is resumed, to the same result.

    Returns:
        {"strategy", "order"?, "seed"?, "stages": [{"learned": names of the tasks so far, "scores": {task: {"loss", of
        each metric its mean, "questions": [{"id", "entity", "answer", of each metric the score}]}}, "costs"?,
        "overlap"?}]} and the environment.
    """
    tasks, (order,), (seed,) = tasks_of(experiment), experiment.orders, experiment.seeds
    place, ordered = experiment.out.parent, [tasks[name] for name in order]
    strategy = next(iter(strategies_of(experiment)), None)
    tokenizer = Tokenizer.from_checkpoint(experiment.checkpoint_dir)
    fabric = start_fabric(_arguments(experiment, experiment.checkpoint_dir, place, 0))
    start = Learned(experiment.checkpoint_dir, None)
    if strategy is None:
        scores = measure(experiment, fabric, tokenizer, start, ordered)
        return {"strategy": BASE, "stages": [{"learned": [], "scores": scores}], **run_environment()}
    before, stages = start, []
    alone, at_once = strategy.name == ISOLATED, strategy.name == JOINT
    for number, learning in enumerate([ordered] if at_once else [[task] for task in ordered]):
        earlier = [] if alone or at_once else ordered[:number]
        before = learn(experiment, fabric, tokenizer, strategy, earlier, learning, start if alone else before, place)
        file = place / f"{stage_name(learning)}.json"
        if not file.is_file():
            scores = measure(experiment, fabric, tokenizer, before, learning if alone else ordered)
            learned = [task.name for task in (*earlier, *learning)]
            write_json(file, {"learned": learned, "scores": scores, **_costs(before.adapter_dir)})
        stages.append(read_json(file))
    if experiment.keep_only_adapters:
        for path in [path for kind in ("*/state", "*/best", "*-base") for path in place.glob(kind)]:
            shutil.rmtree(path)
    return {"strategy": strategy.label, "order": order, "seed": seed, "stages": stages, **run_environment()}


def stage_name(learning: Sequence[Task]) -> str:
    """What the files of a task are called, or those of all tasks at once."""
    return JOINT if len(learning) > 1 else learning[0].name


def learn(
    experiment: ContinualExperiment,
    fabric: Fabric,
    tokenizer: Tokenizer,
    strategy: Strategy,
    earlier: Sequence[Task],
    learning: Sequence[Task],
    before: Learned,
    place: Path,
) -> Learned:
    """Train the adapter of the next task (of several: jointly), unless that is done, and say where it lies."""
    name = stage_name(learning)
    # No two adapters of a sequence begin with the same values; the first begins as an isolated one does.
    seed = 1000 * experiment.seeds[0] + len(earlier)
    arguments = _arguments(experiment, before.checkpoint_dir, place / name, seed)
    if earlier:
        arguments.start_adapter = before.adapter_dir
        arguments.start_mode = {"merge": "merge", "o-lora": "stack"}.get(strategy.name, "continue")
        arguments.merged_dir = place / f"{name}-base" if strategy.name == "merge" else None
    elif experiment.first_tasks is not None and (experiment.first_tasks / name / "report.json").is_file():
        return Learned(before.checkpoint_dir, experiment.first_tasks / name)
    after = Learned(arguments.merged_dir or before.checkpoint_dir, arguments.out_dir)
    if (arguments.out_dir / "report.json").is_file():
        return after
    progress(f"learning {name} by {strategy.label}" + (f" after {', '.join(t.name for t in earlier)}" * bool(earlier)))
    parts = []
    for task in learning:
        windows = train_windows(experiment, task, tokenizer, seed)
        tokens = task.tokens or experiment.tokens or experiment.train.epochs * size_of(windows)
        parts.append((windows, tokens))
    replayed = sum(tokens for _, tokens in parts) * strategy.replay_ratio / (1 - strategy.replay_ratio)
    if earlier and strategy.name == "replay":
        parts += [(train_windows(experiment, task, tokenizer, seed), replayed / len(earlier)) for task in earlier]
    elif earlier and strategy.name == "generative":
        generated = place / f"{name}-generated"
        if not generated.exists():
            model = _load(experiment, fabric, before).eval()
            stores = [own.store for task in earlier for own in train_windows(experiment, task, tokenizer, 0).values()]
            write_generated(model, tokenizer, stores, generated, replayed, experiment.train.sequence_length, seed)
            del model
        parts.append((train_windows(experiment, Task(name, Path(), (generated,)), tokenizer, seed), replayed))
    corpus = Corpus(mixed(parts, seed), held_out_windows(experiment, learning[0], tokenizer), None, [])
    arguments.eval.probe_style, arguments.eval.probe_system = _style_of(experiment, learning[0])
    fabric.seed_everything(seed, verbose=False)
    model, save = lora_learner(fabric, arguments)
    # An adapter directory does not say at which rates it was trained.
    rates = {name: getattr(experiment.lora, name) for name in ("plus_ratio", "embedding_learning_rate")}
    model.lora_config = replace(model.lora_config, **rates)
    if earlier and strategy.name == "o-lora":
        penalty = model.auxiliary = Orthogonality(model, strategy.orthogonality)
        corpus.measure = lambda _: {"overlap": penalty.overlap().item()}
    train(fabric, model, tokenizer, corpus, arguments, save)
    return after


def _arguments(experiment: ContinualExperiment, checkpoint_dir: Path, out_dir: Path, seed: int) -> LoRARunArguments:
    """Of one task's training; it is resumed where it was begun."""
    return LoRARunArguments(
        checkpoint_dir=checkpoint_dir,
        out_dir=out_dir,
        train=replace(experiment.train, epochs=1.0, seed=seed),
        eval=replace(experiment.eval),
        lora=experiment.lora,
        quantize=experiment.quantize,
        embeddings=experiment.embeddings,
        precision=experiment.precision,
        resume=(out_dir / "lit_config.yaml").is_file(),
    )


def _style_of(experiment: ContinualExperiment, task: Task) -> tuple[str, str | None]:
    """Prompt style and system message of a task's questions: the experiment's, its instruction store's, the base's."""
    if experiment.eval.probe_style is not None:
        return experiment.eval.probe_style, experiment.eval.probe_system
    metas = [read_json(path / "meta.json") for path in task.data_dirs]
    stated = next((meta for meta in metas if "style" in meta), None)
    if stated is not None:
        return stated["style"], stated["system"]
    return detect_style(experiment.checkpoint_dir), experiment.eval.probe_system


def _load(experiment: ContinualExperiment, fabric: Fabric, learned: Learned) -> Llama:
    dtype = _arguments(experiment, learned.checkpoint_dir, Path(), 0).dtype
    model = load_model(learned.checkpoint_dir, dtype, fabric.device, experiment.quantize, experiment.embeddings)
    if learned.adapter_dir is not None:
        load_adapter(model, learned.adapter_dir)
    return model


def _costs(adapter_dir: Path) -> dict[str, Any]:
    """What a task's training took; of O-LoRA also how far its directions overlap with the earlier ones."""
    report = read_json(adapter_dir / "report.json")
    generated = adapter_dir.with_name(f"{adapter_dir.name}-generated") / "meta.json"
    seconds = report["training_seconds"] + (read_json(generated)["seconds"] if generated.is_file() else 0.0)
    costs = {key: report[key] for key in ("tokens", "trainable_parameters", "peak_memory_gb")}
    overlap = {when: report[when]["overlap"] for when in ("before", "after") if "overlap" in report[when]}
    return {"costs": {**costs, "seconds": seconds}, **({"overlap": overlap} if overlap else {})}


def measure(
    experiment: ContinualExperiment, fabric: Fabric, tokenizer: Tokenizer, learned: Learned, tasks: Sequence[Task]
) -> dict[str, dict[str, Any]]:
    """Loss and closed-book answers of each task, by a model as it lies on the disk."""
    model = _load(experiment, fabric, learned).eval()
    options, scores = experiment.eval, {}
    for task in tasks:
        windows = held_out_windows(experiment, task, tokenizer)
        scores[task.name] = {"loss": evaluate_loss(model, windows, options.batch_size, options.max_windows).loss}
    pack_linear_layers(model)  # from here on it only generates
    for task in tasks:
        style, system = _style_of(experiment, task)
        questions = [{"relation": "", "form": ""} | row for row in read_questions(task.question_file)]
        prompts = encode_questions(tokenizer, questions, style, system)
        answers = answer_briefly(model, tokenizer, prompts, answer_limits(tokenizer, style, questions), style)
        rows = []
        for question, answer in zip(questions, answers, strict=True):
            entity = f"{task.name}: {question.get('doc_id', question['id'])}"
            found = score_answer(answer, question["answers"])
            rows.append({"id": question["id"], "entity": entity, "answer": answer, **{m: found[m] for m in MEASURES}})
        means = {metric: math.fsum(row[metric] for row in rows) / len(rows) for metric in MEASURES}
        scores[task.name] |= {**means, "questions": rows}
    return scores
