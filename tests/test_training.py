"""The training loop against PEFT and a plain PyTorch loop on the same windows; resume, stop, errors."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file

from lit_llama.checkpoint import load_model
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore, TokenStoreWriter
from lit_llama.errors import InputError, RunError
from lit_llama.evaluation.perplexity import evaluate_loss
from lit_llama.lora import LoRAConfig, inject_lora, load_adapter, save_adapter
from lit_llama.optimizer import learning_rate_at
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import (
    Corpus,
    EvalConfig,
    ReplayConfig,
    TrainConfig,
    TrainingArguments,
    start_fabric,
    train,
)

LORA = LoRAConfig(r=4, alpha=8)


def write_store(data_dir: Path, checkpoint_dir: Path, seed: int, documents: int = 12) -> Path:
    """A token store of documents whose tokens follow one another by a rule, so that there is something to learn."""
    random = np.random.default_rng(seed)
    tokenizer = Tokenizer.from_checkpoint(checkpoint_dir)
    with TokenStoreWriter(data_dir, tokenizer.vocab_size, tokenizer.sha256, str(checkpoint_dir)) as writer:
        for number in range(documents + 4):
            tokens = (random.integers(3, 320) + 7 * np.arange(random.integers(5, 60))) % 300 + 3
            split = "train" if number < documents else "val"
            writer.add(split, tokens, num_words=len(tokens), num_bytes=4 * len(tokens))
    return data_dir


@pytest.fixture(scope="module")
def stores(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("stores")
    probes = directory / "probes.jsonl"
    probes.write_text(
        '{"question": "What is the capital of Norway?", "answers": ["Oslo"]}\n{"question": "Say something."}\n'
    )
    return {
        "domain": write_store(directory / "domain", tiny_checkpoint, seed=0),
        "general": write_store(directory / "general", tiny_checkpoint, seed=1),
        "probes": probes,
    }


def arguments_for(
    tiny_checkpoint: Path, stores: dict[str, Path], out_dir: Path, **changes: object
) -> TrainingArguments:
    train_config = {
        "max_steps": 6, "learning_rate": 1e-2, "warmup_steps": 2, "sequence_length": 32, "micro_batch_size": 2,
        "global_batch_size": 4, "weight_decay": 0.1, **changes.pop("train", {}),
    }  # fmt: skip
    return TrainingArguments(
        checkpoint_dir=tiny_checkpoint,
        data_dir=stores["domain"],
        out_dir=out_dir,
        precision=changes.pop("precision", "fp32"),
        train=TrainConfig(**train_config),
        eval=EvalConfig(**{"interval": 3, "probe_tokens": 4, **changes.pop("eval", {})}),
        accelerator="cpu",
        **changes,
    )


def train_adapter(
    arguments: TrainingArguments, lora: LoRAConfig = LORA, quantize: str | None = None, on_save: object = None
) -> dict:
    """What pretrain/lora.py does, with a hook at each save."""
    fabric = start_fabric(arguments)
    tokenizer = Tokenizer.from_checkpoint(arguments.checkpoint_dir)
    corpus = Corpus.open(arguments, tokenizer)
    model = load_model(arguments.checkpoint_dir, arguments.dtype, fabric.device, quantize)
    inject_lora(model, lora)

    def save(directory: Path) -> None:
        save_adapter(model, directory)
        if on_save:
            on_save()

    return train(fabric, model, tokenizer, corpus, arguments, save)


def rows(out_dir: Path) -> list[dict[str, str]]:
    with open(out_dir / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_adapter_equals_one_trained_with_peft_and_a_plain_loop(
    tiny_checkpoint: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    arguments = arguments_for(tiny_checkpoint, stores, tmp_path / "ours")
    train_adapter(arguments)
    config = arguments.train

    # The reference starts at our initial adapter, and sees each document of a window in a row of its own.
    torch.manual_seed(config.seed)
    initial = load_model(tiny_checkpoint, torch.float32)
    inject_lora(initial, LORA)
    save_adapter(initial, tmp_path / "initial")
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "initial", is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
    windows = TrainingWindows(TokenStore.open(stores["domain"], "train"), config.sequence_length, config.seed)
    losses = []
    for step in range(config.max_steps):
        batch = [windows[step * config.global_batch_size + i] for i in range(config.global_batch_size)]
        total, targets = 0.0, 0
        for window in batch:
            for document in set(window.document_ids[window.document_ids >= 0].tolist()):
                part = window.document_ids == document
                logits = model(torch.from_numpy(window.input_ids[part])[None]).logits[0]
                labels = torch.from_numpy(window.labels[part])
                total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                targets += len(labels)
        loss = total / targets
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config.max_steps, config.warmup_steps, config.learning_rate, 0.1)
        optimizer.step()
        optimizer.zero_grad()

    own_losses = [float(row["train_loss"]) for row in rows(tmp_path / "ours") if row["train_loss"]]
    assert own_losses == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]
    own = load_file(tmp_path / "ours/adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            other = own[name.replace(".default", "")]
            assert (other - parameter).abs().max() < 2e-3 * max(1.0, parameter.abs().max()), name


def test_schedule() -> None:
    rates = [learning_rate_at(step, 11, 2, 1.0, 0.1) for step in range(11)]
    assert rates[:2] == [0.5, 1.0] and rates[2] == 1.0
    assert rates[6] == pytest.approx(0.55) and rates[10] == pytest.approx(0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_ends_with_the_same_bytes(
    precision: str, tiny_checkpoint: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    lora = LoRAConfig(r=4, dropout=0.2)
    common = {
        "precision": precision,
        "replay": ReplayConfig(stores["general"], 0.25),
        "probe_file": stores["probes"],
        "train": {"max_steps": 9},
    }
    train_adapter(arguments_for(tiny_checkpoint, stores, tmp_path / "whole", **common), lora)

    broken = tmp_path / "broken"
    signals = [signal.SIGTERM]
    with pytest.raises(SystemExit) as stopped:
        train_adapter(
            arguments_for(tiny_checkpoint, stores, broken, **common),
            lora,
            on_save=lambda: os.kill(os.getpid(), signals.pop()) if signals else None,
        )
    assert stopped.value.code == 128 + signal.SIGTERM
    assert json.loads((broken / "state/state.json").read_text())["step"] == 4
    torch.manual_seed(12345)  # the resumed process knows nothing of the first one's random state
    train_adapter(arguments_for(tiny_checkpoint, stores, broken, resume=True, **common), lora)

    for name in ("adapter_model.safetensors", "best/adapter_model.safetensors", "probes.jsonl"):
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    timed = {"tokens_per_second", "mfu", "memory_gb", "seconds"}
    for one, other in zip(rows(broken), rows(tmp_path / "whole"), strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    report = json.loads((broken / "report.json").read_text())
    assert report["steps"] == 9 and report["status"] == "finished" and len(report["probes"]) == 2


@pytest.mark.parametrize("quantize", [None, "nf4-dq", "int8"])
def test_reported_loss_is_the_loss_of_the_saved_adapter(
    quantize: str | None, tiny_checkpoint: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    report = train_adapter(
        arguments_for(tiny_checkpoint, stores, tmp_path, precision="bf16"), LoRAConfig(r=4, dropout=0.1), quantize
    )
    model = load_model(tiny_checkpoint, torch.bfloat16, quantize=quantize)
    load_adapter(model, tmp_path)
    windows = TrainingWindows(TokenStore.open(stores["domain"], "val"), 32, seed=0, shuffle=False)
    assert evaluate_loss(model, windows, 8).loss == report["after"]["val_loss"]
    assert report["after"]["val_loss"] < report["before"]["val_loss"]


def test_base_weights_do_not_change(tiny_checkpoint: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    arguments = arguments_for(tiny_checkpoint, stores, tmp_path, precision="bf16")
    fabric = start_fabric(arguments)
    tokenizer = Tokenizer.from_checkpoint(tiny_checkpoint)
    model = load_model(tiny_checkpoint, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stored = (tiny_checkpoint / "model.safetensors").read_bytes()
    inject_lora(model, LORA)
    corpus = Corpus.open(arguments, tokenizer)
    train(fabric, model, tokenizer, corpus, arguments, save=lambda path: save_adapter(model, path))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert (tiny_checkpoint / "model.safetensors").read_bytes() == stored


def test_micro_batches_do_not_change_the_result(tiny_checkpoint: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    for size in (1, 4):
        train_adapter(arguments_for(tiny_checkpoint, stores, tmp_path / str(size), train={"micro_batch_size": size}))
    one, four = (load_file(tmp_path / str(size) / "adapter_model.safetensors") for size in (1, 4))
    for name in one:
        assert (one[name] - four[name]).abs().max() < 1e-3


def test_an_epoch_uses_every_window_once(tiny_checkpoint: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    report = train_adapter(
        arguments_for(tiny_checkpoint, stores, tmp_path, train={"max_steps": None, "epochs": 2, "global_batch_size": 3})
    )
    windows = TrainingWindows(TokenStore.open(stores["domain"], "train"), 32, 0)
    assert report["tokens"] == 2 * windows.windows_per_epoch * 32


def test_early_stopping_keeps_the_best(tiny_checkpoint: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    report = train_adapter(
        arguments_for(
            tiny_checkpoint, stores, tmp_path,
            train={"max_steps": 60, "learning_rate": 0.5, "patience": 2, "gradient_clip": 0}, eval={"interval": 2},
        )
    )  # fmt: skip
    assert report["status"] == "stopped early" and report["steps"] < 60
    losses = {int(row["step"]): float(row["val_loss"]) for row in rows(tmp_path) if row["val_loss"]}
    assert report["best_step"] == min(losses, key=losses.get)
    assert report["best_val_loss"] == pytest.approx(min(losses.values()))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    tiny_checkpoint: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    arguments = arguments_for(
        tiny_checkpoint, stores, tmp_path, train={"max_steps": 50, "learning_rate": 1e30, "warmup_steps": 0}
    )
    with pytest.raises(RunError, match=r"step \d+: training stopped, the state after step \d+ is kept"):
        train_adapter(arguments)
    state = load_file(*(tmp_path / "state").glob("step-*.safetensors"))
    assert all(torch.isfinite(t).all() for name, t in state.items() if name.startswith("parameter."))
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_misuse_is_one_line(tiny_checkpoint: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    with pytest.raises(InputError, match="holds no run to resume"):
        train_adapter(arguments_for(tiny_checkpoint, stores, out_dir, resume=True))
    train_adapter(arguments_for(tiny_checkpoint, stores, out_dir))
    with pytest.raises(InputError, match="exists already"):
        train_adapter(arguments_for(tiny_checkpoint, stores, out_dir))
    with pytest.raises(InputError, match="--train.learning_rate is 0.5 but was 0.01"):
        train_adapter(arguments_for(tiny_checkpoint, stores, out_dir, resume=True, train={"learning_rate": 0.5}))
    with pytest.raises(InputError, match="not a multiple|at least 1"):
        train_adapter(arguments_for(tiny_checkpoint, stores, tmp_path / "b", train={"micro_batch_size": 0}))
    with pytest.raises(InputError, match="not one of bf16, fp32"):
        train_adapter(arguments_for(tiny_checkpoint, stores, tmp_path / "c", precision="fp16"))
    train_adapter(arguments_for(tiny_checkpoint, stores, out_dir, overwrite=True, train={"max_steps": 3}))
    assert json.loads((out_dir / "report.json").read_text())["steps"] == 3


def test_full_training_with_master_weights(tiny_checkpoint: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    run_script(
        "pretrain/full.py", "--checkpoint_dir", tiny_checkpoint, "--data_dir", stores["domain"], "--out_dir", tmp_path,
        "--train.max_steps", 4, "--train.sequence_length", 32, "--train.learning_rate", 1e-3, "--eval.interval", 2,
        "--overwrite", "true",
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["after"]["val_loss"] < report["before"]["val_loss"]
    assert report["trainable_parameters"] == report["total_parameters"]
    model = load_model(tmp_path / "checkpoint", torch.bfloat16)
    windows = TrainingWindows(TokenStore.open(stores["domain"], "val"), 32, seed=0, shuffle=False)
    assert evaluate_loss(model, windows, 8).loss == report["after"]["val_loss"]


def test_command_with_everything_on(tiny_checkpoint: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    process = run_script(
        "pretrain/lora.py", "--checkpoint_dir", tiny_checkpoint, "--data_dir", stores["domain"],
        "--out_dir", tmp_path / "a",
        "--lora.targets", "[q_proj, v_proj]", "--lora.rank_pattern", '{"q_proj": 2}', "--lora.dropout", 0.1,
        "--train.max_steps", 3, "--train.sequence_length", 32, "--replay.data_dir", stores["general"],
        "--probe_file", stores["probes"], "--quantize", "nf4", "--tracker", "[csv, tensorboard, neptune]",
    )  # fmt: skip
    assert process.stdout == ""
    assert "general" in process.stderr and "probes 0/1" in process.stderr and "report" in process.stderr
    assert (tmp_path / "a/report.md").read_text().count("What is the capital of Norway?") == 1
    again = run_script("pretrain/lora.py", "--config", tmp_path / "a/lit_config.yaml", "--out_dir", tmp_path / "b")
    assert again.returncode == 0
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)

    wrong = run_script(
        "pretrain/lora.py", "--config", tmp_path / "a/lit_config.yaml", "--out_dir", tmp_path / "c",
        "--lora.targets", "[q_prj]", check=False,
    )  # fmt: skip
    assert wrong.returncode == 2 and "q_prj" in wrong.stderr.splitlines()[-1] and not (tmp_path / "c").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(
    number: signal.Signals, tiny_checkpoint: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [
            sys.executable, ROOT / "pretrain/lora.py", "--checkpoint_dir", tiny_checkpoint,
            "--data_dir", stores["domain"], "--out_dir", tmp_path / "run",
            "--train.max_steps", "100000", "--train.sequence_length", "32",
        ],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run/metrics.csv"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 4):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "--resume true" in errors and "Traceback" not in errors
    step = json.loads((tmp_path / "run/state/state.json").read_text())["step"]
    assert step == int(rows(tmp_path / "run")[-1]["step"])


def test_two_processes_train_what_one_does(tiny_checkpoint: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    for devices in (1, 2):
        run_script(
            "pretrain/lora.py", "--checkpoint_dir", tiny_checkpoint, "--data_dir", stores["domain"],
            "--out_dir", tmp_path / str(devices), "--precision", "fp32", "--accelerator", "cpu", "--devices", devices,
            "--strategy", "ddp", "--train.max_steps", 4, "--train.sequence_length", 32, "--train.learning_rate", 1e-2,
        )  # fmt: skip
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "12")
    assert all((one[name] - two[name]).abs().max() < 1e-3 for name in one)
