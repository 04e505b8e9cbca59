"""The one training loop: packed windows in, an adapter (or a model) and a report out.

    windows -> forward, loss over targets -> backward -> (every global batch) clip, step
            -> every eval.interval steps: held-out loss, general-text loss, probe questions, resumable state, best so
            far

Everything that depends on chance or order is a function of the step, so that a resumed run ends with the same bytes
as one without the break. Scripts (`pretrain/*.py`) build the model and call `train`; a single step is in
`training_step.py`, what a run writes in `run_files.py`.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from lit_llama.activations import ActivationConfig, apply_activation_config
from lit_llama.command_line import progress
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.streaming import StreamedWindows, is_stream
from lit_llama.data.token_store import TokenStore
from lit_llama.errors import InputError, RunError
from lit_llama.evaluation.perplexity import evaluate_loss
from lit_llama.evaluation.questions import prompt_of, read_questions, score_answer
from lit_llama.faults import out_of_memory_explained, stop_on_signal
from lit_llama.generation import answer_questions
from lit_llama.hardware import keep_freed_memory, peak_flops, peak_memory_gb
from lit_llama.lora import learning_rate_factors
from lit_llama.model import Llama
from lit_llama.optimizer import Optimizer, OptimizerName, learning_rate_at
from lit_llama.parallel import run_inside, sharded_strategy
from lit_llama.prompts import detect_style
from lit_llama.run_files import RunFiles, RunState
from lit_llama.tokenizer import Tokenizer
from lit_llama.training_step import GlobalBatch, LossOfBatch, StepUnderWay, prepare_step, take_step


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
    optimizer: OptimizerName = "adamw"
    """adamw, adamw-8bit (a quarter of its state), or either paged to the CPU's memory when a CUDA card's is short."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_clip: float = 1.0
    """Largest joint norm of the gradients; 0 switches clipping off."""
    sequence_length: int = 512
    """Tokens a window; documents are packed into windows and do not see each other."""
    packed: bool = True
    """Pack examples of an instruction store into windows too. False: each is a window of its own length, in batches of
    about one length; batch sizes then count examples. The loss of an example is the same either way."""
    micro_batch_size: int = 4
    """Windows a forward pass on one device: as many as memory allows."""
    global_batch_size: int = 8
    """Windows an optimizer step, over all devices and accumulation steps."""
    compile: bool = False
    """Compile the decoder layers (torch.compile): faster on CUDA after a minute of compiling."""
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
    """Prompt style of the probes; by default the instruction store's, else the checkpoint's own. It is kept with the
    adapter, for generate/*."""
    probe_system: str | None = None
    """System message of the probes; by default the instruction store's. Kept likewise."""


@dataclass
class ReplayConfig:
    """General text mixed in against forgetting."""

    data_dir: Path | None = None
    """A token store; its held-out part is scored at every evaluation as general_loss."""
    ratio: float = 0.1
    """Share of the training windows that are replay."""


@dataclass(kw_only=True)
class RunArguments:
    """What every training run takes, whatever it learns from."""

    checkpoint_dir: Path
    """Base model, a Hugging Face directory."""
    out_dir: Path
    """Where the run is written."""
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    activations: ActivationConfig = field(default_factory=ActivationConfig)
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


@dataclass(kw_only=True)
class TrainingArguments(RunArguments):
    """What every script takes that trains on a token store; scripts add their own."""

    data_dir: str
    """Token store of the domain, made by scripts/prepare_corpus.py or scripts/prepare_instructions.py, or directory or
    URL of a stream of it, made by scripts/stream_corpus.py."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    probe_file: Path | None = None
    """Questions (JSONL) to ask before, during and after training."""


@dataclass
class Corpus:
    """What a run trains on and is measured by.

    Attributes:
        measure: figures of the model besides its losses, by name (`accuracy`), at every evaluation.
    """

    windows: TrainingWindows | StreamedWindows
    held_out: TrainingWindows | StreamedWindows
    general: TrainingWindows | None
    probes: list[dict]
    measure: Callable[[Llama], dict[str, float]] | None = None

    @classmethod
    def open(cls, arguments: TrainingArguments, tokenizer: Tokenizer) -> "Corpus":
        """Open the stores that the arguments name and check that they fit the tokenizer.

        The prompt style of an instruction store becomes that of the probes, where the arguments name none.
        """
        train, replay, global_batch = arguments.train, arguments.replay, arguments.train.global_batch_size

        def open_windows(data_dir: Path | str, split: str, **options: Any) -> TrainingWindows | StreamedWindows:
            if is_stream(data_dir):
                return StreamedWindows(str(data_dir), split, train.sequence_length, tokenizer.sha256, **options)
            store = open_store(data_dir, split)
            if arguments.eval.probe_style is None and data_dir == arguments.data_dir and "style" in store.meta:
                arguments.eval.probe_style, arguments.eval.probe_system = store.meta["style"], store.meta["system"]
            layout = "packed" if train.packed else "padded"
            return TrainingWindows(store, train.sequence_length, **options, examples=layout, batch_size=global_batch)

        def open_store(data_dir: Path | str, split: str) -> TokenStore:
            return TokenStore.open(data_dir, split, tokenizer_sha256=tokenizer.sha256)

        replay_store = open_store(replay.data_dir, "train") if replay.data_dir and replay.ratio else None
        return cls(
            windows=open_windows(
                arguments.data_dir,
                "train",
                seed=train.seed,
                replay=replay_store,
                replay_ratio=replay.ratio if replay_store else 0.0,
            ),
            held_out=open_windows(arguments.data_dir, "val", seed=0, shuffle=False),
            general=open_windows(replay.data_dir, "val", seed=0, shuffle=False) if replay.data_dir else None,
            probes=read_questions(arguments.probe_file, need_answers=False) if arguments.probe_file else [],
        )


def start_fabric(arguments: RunArguments) -> Fabric:
    """Start the processes and seed them.

    Fabric's own precision is left at 32-bit: the dtype of each part (base bf16, adapters fp32) is the model's business.
    """
    if arguments.strategy != "auto" and arguments.devices * arguments.nodes == 1:
        progress(f"note: strategy {arguments.strategy} has no effect on one device")
    if arguments.strategy not in ("auto", "ddp", "fsdp"):
        raise InputError(f"--strategy {arguments.strategy} is not one of auto, ddp, fsdp")
    world_size = arguments.devices * arguments.nodes
    started = int(os.environ.get("WORLD_SIZE", world_size))  # by torchrun, or by Fabric in the processes that it starts
    if started != world_size:
        raise InputError(
            f"{started} processes were started, but --devices {arguments.devices} and --nodes {arguments.nodes} mean"
            f" {world_size}; make them agree"
        )
    strategy = arguments.strategy if world_size > 1 else "auto"
    fabric = Fabric(
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        num_nodes=arguments.nodes,
        strategy=sharded_strategy(world_size) if strategy == "fsdp" else strategy,
    )
    fabric.launch()
    if fabric.device.type == "cpu":
        keep_freed_memory()
    # The same in all processes, which must begin with the same adapter; `train` lets them differ for dropout.
    fabric.seed_everything(arguments.train.seed, verbose=False)
    return fabric


def train(
    fabric: Fabric,
    model: Llama,
    tokenizer: Tokenizer,
    corpus: Corpus,
    arguments: RunArguments,
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
    if config.compile and not config.packed:
        raise InputError("train.compile needs windows of one length: leave train.packed at true")
    total_steps, last_window = _planned_steps(corpus.windows, config)
    local_batch = _local_batch(config, fabric.world_size)
    files = RunFiles(arguments, fabric, model, save)
    apply_activation_config(model, arguments.activations, fabric.device, config.compile)
    loss_of_batch = LossOfBatch(model)
    step_module = fabric.setup_module(loss_of_batch).train()
    if fabric.global_rank:
        torch.manual_seed(config.seed + fabric.global_rank)
    betas = (config.beta1, config.beta2)
    optimizer = Optimizer(model, config.weight_decay, betas, config.optimizer, learning_rate_factors(model))
    style = arguments.eval.probe_style or detect_style(arguments.checkpoint_dir)
    flops_per_token = training_flops_per_token(model)
    machine_flops = peak_flops(fabric.device, arguments.dtype) * fabric.world_size
    state = files.resume(optimizer) if arguments.resume else RunState()
    enough = config.patience is not None and state.evaluations_without_gain >= config.patience
    stopped_early = state.step > 0 and enough
    if state.step >= total_steps or stopped_early:
        progress(f"{arguments.out_dir}: training is done already, after step {state.step}")
        status = "stopped early" if stopped_early else "finished"
        return files.report(optimizer, corpus, state, status, total_parameters(model))
    files.announce(optimizer, corpus, total_steps, state)

    def measure() -> dict[str, Any]:
        metrics = _held_out_metrics(fabric, model, corpus, arguments.eval)
        return {"metrics": metrics, "answers": _ask_probes(model, tokenizer, corpus.probes, style, arguments.eval)}

    def evaluate() -> None:
        """Measure and record; after the first step also keep the best adapter and a resumable state."""
        nonlocal mark
        start = time.perf_counter()
        measured = run_inside(loss_of_batch, measure)
        metrics, answers = measured["metrics"], measured["answers"]
        scored = [answer["correct"] for answer in answers if "correct" in answer]
        if scored:
            metrics["probe_accuracy"] = sum(scored) / len(scored)
        state.last_metrics = metrics
        state.evaluation_seconds += time.perf_counter() - start
        files.record_evaluation(metrics, answers, state)
        if state.step == 0:
            state.first_metrics = metrics
            mark = time.perf_counter()
            return
        is_best = state.best_val_loss is None or metrics["val_loss"] < state.best_val_loss
        if is_best:
            state.best_val_loss, state.best_step = metrics["val_loss"], state.step
        state.evaluations_without_gain = 0 if is_best else state.evaluations_without_gain + 1
        files.save(optimizer, state)
        mark = time.perf_counter()

    def prepare(step: int) -> GlobalBatch:
        """This device's part of the global batch of a step, on its way to the device."""
        first = step * config.global_batch_size + fabric.global_rank * local_batch
        indices = [i for i in range(first, first + local_batch) if i < last_window]
        return prepare_step(fabric, corpus.windows, indices, config, bool(signals))

    def settle(step: StepUnderWay) -> bool:
        """Wait for a step's figures and record them; returns whether a process was told to stop when it was prepared.

        `state` describes the last settled step; the device may already compute the one after it.
        """
        nonlocal mark
        total, gradient_norm, targets, tokens, stopping = step.figures.read()
        loss = total / max(1, targets)
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            files.save(optimizer, state)
            files.finish("failed")
            raise RunError(
                f"loss {loss:.4g} with gradient norm {gradient_norm:.4g} at step {state.step + 1}: training"
                f" stopped, the state after step {state.step} is kept in {arguments.out_dir}; lower"
                " train.learning_rate or set train.gradient_clip, then resume or start again"
            )
        now = time.perf_counter()
        seconds, mark = now - mark, now
        state.step += 1
        state.tokens += int(tokens)
        state.training_seconds += seconds
        files.record_step(
            {
                "epoch": state.step * config.global_batch_size / corpus.windows.windows_per_epoch,
                "tokens": state.tokens,
                "learning_rate": step.learning_rate,
                "train_loss": loss,
                "gradient_norm": gradient_norm,
                "tokens_per_second": tokens / seconds,
                "mfu": flops_per_token * tokens / seconds / machine_flops,
                "memory_gb": peak_memory_gb(fabric.device),
                "seconds": state.training_seconds + state.evaluation_seconds,
            },
            state,
            total_steps,
        )
        return stopping > 0

    status = "finished"
    launched = state.step  # steps handed to the device
    under_way: list[StepUnderWay] = []
    # A CUDA device is given the next step before it has finished this one; others finish a step in the call.
    ahead = 1 if fabric.device.type == "cuda" else 0
    failed = torch.zeros((), device=fabric.device)
    mark = time.perf_counter()  # since when time counts as training
    memory_explained = out_of_memory_explained(model, arguments, fabric.device)
    with stop_on_signal() as signals, files.full_disk_explained(), memory_explained:
        if state.step == 0:
            evaluate()
        batch = prepare(launched)
        while launched < total_steps:
            learning_rate = learning_rate_at(
                launched, total_steps, config.warmup_steps, config.learning_rate, config.final_learning_rate
            )
            under_way.append(
                take_step(
                    fabric,
                    step_module,
                    optimizer,
                    batch,
                    learning_rate,
                    config.gradient_clip,
                    failed,
                    getattr(model, "auxiliary", None),
                    launched / total_steps,
                )
            )
            launched += 1
            if launched < total_steps:
                batch = prepare(launched)  # while the device computes
            evaluating = launched % arguments.eval.interval == 0 or launched == total_steps
            # Several processes must leave together: they go by what was summed with the counts of a step.
            stopping = fabric.world_size == 1 and bool(signals)
            while len(under_way) > (0 if evaluating or stopping else ahead):
                stopping |= settle(under_way.pop(0))
            if evaluating:
                evaluate()
                if config.patience is not None and state.evaluations_without_gain >= config.patience:
                    status = "stopped early"
                    break
            if stopping and launched < total_steps:
                files.save(optimizer, state)
                files.finish("interrupted")
                if fabric.is_global_zero:
                    progress(f"stopped after step {state.step}; continue with the same command and --resume true")
                raise SystemExit(128 + signals[0] if signals else 1)
    report = files.report(optimizer, corpus, state, status, total_parameters(model))
    files.finish("finished")
    return report


def _held_out_metrics(fabric: Fabric, model: Llama, corpus: Corpus, config: EvalConfig) -> dict[str, float]:
    result = evaluate_loss(model, corpus.held_out, config.batch_size, config.max_windows, fabric=fabric)
    metrics = {"val_loss": result.loss}
    if result.bits_per_byte is not None:
        metrics["val_bits_per_byte"] = result.bits_per_byte
    if corpus.general is not None:
        general = evaluate_loss(model, corpus.general, config.batch_size, config.max_windows, fabric=fabric)
        metrics["general_loss"] = general.loss
    if corpus.measure is not None:
        metrics |= corpus.measure(model)
    return metrics


def _ask_probes(
    model: Llama, tokenizer: Tokenizer, probes: list[dict], style: str, config: EvalConfig
) -> list[dict[str, Any]]:
    """The model's greedy answers: {question, answer, answers?, correct?}; correct when a gold answer occurs in it."""
    if not probes:
        return []
    prompts = [prompt_of(probe) for probe in probes]
    answers = answer_questions(
        model, tokenizer, prompts, style, config.probe_tokens, config.batch_size, system=config.probe_system
    )
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
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    return 4 * (total_parameters(model) - (0 if config.tie_word_embeddings else embedding) + adapters) + 2 * trainable


def total_parameters(model: Llama) -> int:
    """Parameters of the base, with the head that it has."""
    config = model.config
    if model.labels is None:
        return config.num_parameters
    return config.num_parameters + (len(model.labels) - config.vocab_size) * config.hidden_size


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
