"""The one training loop: packed windows in, an adapter (or a model) and a report out.

    windows -> forward, loss over targets -> backward -> (every global batch) clip, step
            -> every eval.interval steps: held-out loss, general-text loss, probe questions, resumable state, best so
            far

Everything that depends on chance or order is a function of the step, so that a resumed run ends with the same bytes
as one without the break. Scripts (`pretrain/*.py`) build the model and call `train`; what a run writes is in
`run_files.py`.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lit_llama.command_line import progress
from lit_llama.data.packing import TrainingWindows, collate
from lit_llama.data.token_store import TokenStore
from lit_llama.errors import InputError, RunError
from lit_llama.evaluation.perplexity import evaluate_loss
from lit_llama.evaluation.questions import read_questions, score_answer
from lit_llama.generation import answer_questions
from lit_llama.hardware import peak_flops, peak_memory_gb
from lit_llama.loss import IGNORE_INDEX, linear_cross_entropy
from lit_llama.model import Llama
from lit_llama.optimizer import Optimizer, learning_rate_at
from lit_llama.prompts import detect_style
from lit_llama.run_files import RunFiles, RunState
from lit_llama.tokenizer import Tokenizer


@dataclass
class TrainConfig:
    """How long and how to step."""

    epochs: float = 1.0
    """Passes over the domain's windows."""
    max_steps: int | None = None
    """Optimizer steps instead of epochs."""
    learning_rate: float = 3e-4
    """Peak. LoRA wants about ten times what full training wants."""
    final_learning_rate: float = 0.1
    """Where the cosine ends, as a share of the peak."""
    warmup_steps: int = 10
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_clip: float = 1.0
    """Largest joint norm of the gradients; 0 switches clipping off."""
    sequence_length: int = 512
    """Tokens a window; documents are packed into windows and do not see each other."""
    micro_batch_size: int = 4
    """Windows a forward pass on one device: as many as memory allows."""
    global_batch_size: int = 8
    """Windows an optimizer step, over all devices and accumulation steps."""
    seed: int = 0
    patience: int | None = None
    """Stop after this many evaluations without a lower held-out loss. None: never."""


@dataclass
class EvalConfig:
    """What to measure while training."""

    interval: int = 50
    """Optimizer steps between evaluations; there is always one at the start and one at the end."""
    max_windows: int | None = 64
    """Windows of each held-out store to score. None: all."""
    batch_size: int = 8
    probe_tokens: int = 24
    """Longest answer to a probe question."""
    probe_style: str | None = None
    """Prompt style of the probes; by default the checkpoint's own."""


@dataclass
class ReplayConfig:
    """General text mixed in against forgetting."""

    data_dir: Path | None = None
    """A token store; its held-out part is scored at every evaluation as general_loss."""
    ratio: float = 0.1
    """Share of the training windows that are replay."""


@dataclass(kw_only=True)
class TrainingArguments:
    """What every training script takes; scripts add their own."""

    checkpoint_dir: Path
    """Base model, a Hugging Face directory."""
    data_dir: Path
    """Token store of the domain, made by scripts/prepare_corpus.py."""
    out_dir: Path
    """Where the run is written."""
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    probe_file: Path | None = None
    """Questions (JSONL) to ask before, during and after training."""
    tracker: str | list[str] = "csv"
    """csv, tensorboard, neptune or a list of them; metrics.csv is always written."""
    precision: str = "bf16"
    """Precision of the base weights and the computation: bf16 or fp32. What is trained is kept in fp32 either way."""
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"
    resume: bool = False
    """Continue the interrupted run in out_dir."""
    overwrite: bool = False
    """Replace the run in out_dir."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weights."""
        dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
        if self.precision not in dtypes:
            raise InputError(f"precision {self.precision!r} is not one of {', '.join(dtypes)}")
        return dtypes[self.precision]


class LossOfBatch(nn.Module):
    """The model and its loss as one forward, which is what data-parallel wrappers need to see."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, document_ids: Tensor) -> Tensor:
        """Summed cross-entropy of the targets, fp32 scalar; arguments are the fields of `data.packing.Batch`."""
        hidden = self.model.model(input_ids, position_ids, document_ids)
        return linear_cross_entropy(hidden, self.model.lm_head.weight, labels, reduction="sum")


@dataclass
class Corpus:
    """What a run trains on and is measured by."""

    windows: TrainingWindows
    held_out: TrainingWindows
    general: TrainingWindows | None
    probes: list[dict]

    @classmethod
    def open(cls, arguments: TrainingArguments, tokenizer: Tokenizer) -> "Corpus":
        """Open the stores that the arguments name and check that they fit the tokenizer."""
        train, replay = arguments.train, arguments.replay

        def open_store(data_dir: Path, split: str) -> TokenStore:
            return TokenStore.open(data_dir, split, tokenizer_sha256=tokenizer.sha256)

        def unshuffled(data_dir: Path) -> TrainingWindows:
            return TrainingWindows(open_store(data_dir, "val"), train.sequence_length, seed=0, shuffle=False)

        replay_store = open_store(replay.data_dir, "train") if replay.data_dir and replay.ratio else None
        return cls(
            windows=TrainingWindows(
                open_store(arguments.data_dir, "train"),
                train.sequence_length,
                seed=train.seed,
                replay=replay_store,
                replay_ratio=replay.ratio if replay_store else 0.0,
            ),
            held_out=unshuffled(arguments.data_dir),
            general=unshuffled(replay.data_dir) if replay.data_dir else None,
            probes=read_questions(arguments.probe_file, need_answers=False) if arguments.probe_file else [],
        )


def start_fabric(arguments: TrainingArguments) -> Fabric:
    """Start the processes and seed them.

    Fabric's own precision is left at 32-bit: the dtype of each part (base bf16, adapters fp32) is the model's business.
    """
    if arguments.strategy != "auto" and arguments.devices * arguments.nodes == 1:
        progress(f"note: strategy {arguments.strategy} has no effect on one device")
    fabric = Fabric(
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        num_nodes=arguments.nodes,
        strategy=arguments.strategy if arguments.devices * arguments.nodes > 1 else "auto",
    )
    fabric.launch()
    fabric.seed_everything(arguments.train.seed + fabric.global_rank, verbose=False)
    return fabric


def train(
    fabric: Fabric,
    model: Llama,
    tokenizer: Tokenizer,
    corpus: Corpus,
    arguments: TrainingArguments,
    save: Callable[[Path], None],
) -> dict[str, Any]:
    """Train the parameters of `model` that require a gradient.

    Args:
        save: writes what has been trained (adapter or checkpoint) into a directory.

    Returns:
        The report, as written to report.json.

    Raises:
        RunError: the loss is not finite; the last good state has been kept.
    """
    config = arguments.train
    total_steps, last_window = _planned_steps(corpus.windows, config)
    local_batch = _local_batch(config, fabric.world_size)
    files = RunFiles(arguments, fabric, save)
    step_module = fabric.setup_module(LossOfBatch(model)).train()
    optimizer = Optimizer(model, config.weight_decay, (config.beta1, config.beta2))
    style = arguments.eval.probe_style or detect_style(arguments.checkpoint_dir)
    flops_per_token = training_flops_per_token(model)
    machine_flops = peak_flops(fabric.device, arguments.dtype) * fabric.world_size
    state = files.resume(optimizer) if arguments.resume else RunState()
    if state.step >= total_steps:
        progress(f"{arguments.out_dir}: all {total_steps} steps are done already")
        return files.report(optimizer, corpus, state, "finished", model.config.num_parameters)
    files.announce(optimizer, corpus, total_steps, state)

    def evaluate() -> None:
        """Measure and record; after the first step also keep the best adapter and a resumable state."""
        start = time.perf_counter()
        metrics = _held_out_metrics(model, corpus, arguments.eval)
        answers = _ask_probes(model, tokenizer, corpus.probes, style, arguments.eval)
        scored = [answer["correct"] for answer in answers if "correct" in answer]
        if scored:
            metrics["probe_accuracy"] = sum(scored) / len(scored)
        state.last_metrics = metrics
        state.evaluation_seconds += time.perf_counter() - start
        files.record_evaluation(metrics, answers, state)
        if state.step == 0:
            state.first_metrics = metrics
            return
        is_best = state.best_val_loss is None or metrics["val_loss"] < state.best_val_loss
        if is_best:
            state.best_val_loss, state.best_step = metrics["val_loss"], state.step
        state.evaluations_without_gain = 0 if is_best else state.evaluations_without_gain + 1
        files.save(optimizer, state, is_best)

    status = "finished"
    with _stop_on_signal() as signals:
        if state.step == 0:
            evaluate()
        while state.step < total_steps:
            start = time.perf_counter()
            first = state.step * config.global_batch_size + fabric.global_rank * local_batch
            indices = [i for i in range(first, first + local_batch) if i < last_window]
            loss, targets, tokens = _accumulate(fabric, step_module, optimizer, corpus.windows, indices, config)
            gradient_norm = optimizer.clip_gradients(config.gradient_clip)
            if not (math.isfinite(loss) and torch.isfinite(gradient_norm)):
                files.save(optimizer, state, is_best=False)
                files.finish("failed")
                raise RunError(
                    f"loss {loss:.4g} with gradient norm {gradient_norm.item():.4g} at step {state.step + 1}: training"
                    f" stopped, the state after step {state.step} is kept in {arguments.out_dir}; lower"
                    " train.learning_rate or set train.gradient_clip, then resume or start again"
                )
            learning_rate = learning_rate_at(
                state.step, total_steps, config.warmup_steps, config.learning_rate, config.final_learning_rate
            )
            optimizer.step(learning_rate)
            seconds = time.perf_counter() - start
            state.step += 1
            state.tokens += tokens
            state.training_seconds += seconds
            files.record_step(
                {
                    "epoch": state.step * config.global_batch_size / corpus.windows.windows_per_epoch,
                    "tokens": state.tokens,
                    "learning_rate": learning_rate,
                    "train_loss": loss,
                    "gradient_norm": gradient_norm.item(),
                    "tokens_per_second": tokens / seconds,
                    "mfu": flops_per_token * tokens / seconds / machine_flops,
                    "memory_gb": peak_memory_gb(fabric.device),
                    "seconds": state.training_seconds + state.evaluation_seconds,
                },
                state,
                total_steps,
            )
            stopping = any(_gather_flag(fabric, bool(signals)))
            if state.step % arguments.eval.interval == 0 or state.step == total_steps:
                evaluate()
                if config.patience is not None and state.evaluations_without_gain >= config.patience:
                    status = "stopped early"
                    break
            if stopping and state.step < total_steps:
                files.save(optimizer, state, is_best=False)
                files.finish("interrupted")
                progress(f"stopped after step {state.step}; continue with the same command and --resume true")
                raise SystemExit(128 + signals[0] if signals else 1)
    report = files.report(optimizer, corpus, state, status, model.config.num_parameters)
    files.finish("finished")
    return report


def _accumulate(
    fabric: Fabric,
    step_module: nn.Module,
    optimizer: Optimizer,
    windows: TrainingWindows,
    indices: list[int],
    config: TrainConfig,
) -> tuple[float, int, int]:
    """Gradients of one global batch, micro-batch by micro-batch.

    The loss is the mean over target tokens of the whole global batch on all devices, not a mean of means: each
    micro-batch adds its sum divided by that global count.

    Returns:
        (mean loss, target tokens, input tokens), over all devices.
    """
    own = [windows[i] for i in indices]
    batches = [collate(own[i : i + config.micro_batch_size]) for i in range(0, len(own), config.micro_batch_size)]
    if not batches:  # the last step of an epoch may leave a device without a window; it still joins the others' sums
        empty = windows[0]
        batches = [collate([empty._replace(labels=torch.full((len(empty.labels),), IGNORE_INDEX).numpy())])]
    counts = torch.tensor(
        [sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches), sum(len(w.input_ids) for w in own)],
        dtype=torch.int64,
        device=fabric.device,
    )
    targets, tokens = fabric.all_reduce(counts, reduce_op="sum").tolist()
    total = torch.zeros((), device=fabric.device)
    for number, batch in enumerate(batches):
        # Masters collect after every micro-batch, so there each one must be summed over the devices by itself.
        accumulating = number < len(batches) - 1 and not optimizer.has_masters
        with fabric.no_backward_sync(step_module, enabled=accumulating and fabric.world_size > 1):
            loss = step_module(*(tensor.to(fabric.device, non_blocking=True) for tensor in batch))
            # Data-parallel wrappers average gradients over devices; the sum is wanted.
            fabric.backward(loss * (fabric.world_size / max(1, targets)))
        optimizer.collect_gradients()
        total += loss.detach()
    total = fabric.all_reduce(total, reduce_op="sum")
    return total.item() / max(1, targets), targets, tokens


def _held_out_metrics(model: Llama, corpus: Corpus, config: EvalConfig) -> dict[str, float]:
    result = evaluate_loss(model, corpus.held_out, config.batch_size, config.max_windows)
    metrics = {"val_loss": result.loss}
    if result.bits_per_byte is not None:
        metrics["val_bits_per_byte"] = result.bits_per_byte
    if corpus.general is not None:
        metrics["general_loss"] = evaluate_loss(model, corpus.general, config.batch_size, config.max_windows).loss
    return metrics


def _ask_probes(
    model: Llama, tokenizer: Tokenizer, probes: list[dict], style: str, config: EvalConfig
) -> list[dict[str, Any]]:
    """The model's greedy answers: {question, answer, answers?, correct?}; correct when a gold answer occurs in it."""
    if not probes:
        return []
    questions = [probe["question"] for probe in probes]
    answers = answer_questions(model, tokenizer, questions, style, config.probe_tokens, config.batch_size)
    rows = []
    for probe, answer in zip(probes, answers, strict=True):
        row = {"question": probe["question"], "answer": answer}
        if probe.get("answers"):
            row["answers"] = probe["answers"]
            row["correct"] = bool(score_answer(answer, probe["answers"])["contains"])
        rows.append(row)
    return rows


def training_flops_per_token(model: Llama) -> float:
    """Floating-point operations of forward and backward per token in the linear layers and the head.

    Forward 2 N; gradients of activations 2 N; gradients of weights 2 N_trainable. Attention scores are not counted
    (below a tenth at these lengths), so MFU is understated rather than overstated.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim == 2)
    config = model.config
    # By the configuration, because packed weights are no parameters and a tied head goes by the embedding's name.
    embedding = config.vocab_size * config.hidden_size
    base = config.num_parameters - embedding * (1 if config.tie_word_embeddings else 2) + embedding
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    return 4 * (base + adapters) + 2 * trainable


def _planned_steps(windows: TrainingWindows, config: TrainConfig) -> tuple[int, int]:
    """(optimizer steps, index after the last window to use)."""
    if config.max_steps is not None:
        return config.max_steps, config.max_steps * config.global_batch_size
    last_window = round(config.epochs * windows.windows_per_epoch)
    steps = math.ceil(last_window / config.global_batch_size)
    if steps < 1:
        raise InputError(f"train.epochs {config.epochs} is less than one window of the corpus")
    return steps, last_window


def _local_batch(config: TrainConfig, world_size: int) -> int:
    """Windows an optimizer step on each device."""
    if config.global_batch_size % world_size:
        raise InputError(
            f"train.global_batch_size {config.global_batch_size} is not a multiple of the {world_size} devices"
        )
    if config.micro_batch_size < 1 or config.global_batch_size < 1:
        raise InputError("train.micro_batch_size and train.global_batch_size must be at least 1")
    return config.global_batch_size // world_size


def _gather_flag(fabric: Fabric, flag: bool) -> list[bool]:
    """The flag of every process, so that all of them leave the loop together."""
    if fabric.world_size == 1:
        return [flag]
    return fabric.all_gather(torch.tensor(flag, device=fabric.device)).flatten().tolist()


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying, so that the step under way ends and is saved; a second one kills."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        progress("stopping after this step (once more to stop at once, losing what is not saved)")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
