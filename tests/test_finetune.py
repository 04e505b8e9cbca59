"""finetune/lora.py and finetune/full.py from a file of instructions to what is served, and adapters on adapters."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
import yaml
from conftest import ROOT, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_llama.checkpoint import load_model
from lit_llama.errors import InputError
from lit_llama.lora import LoRAConfig, inject_lora, load_adapter, lora_layers, save_adapter, stack_lora

SHORT = ("--train.sequence_length", 240, "--train.max_steps", 6, "--eval.interval", 3, "--precision", "fp32")
ROWS = [
    {"instruction": "Name the capital of Norway.", "output": "Oslo."},
    {"instruction": "Which river carries the most water?", "output": "The Amazon."},
    {"instruction": "Say it in one word.", "input": "The quick brown fox jumps.", "output": "Fox."},
    {"instruction": "What is the highest point of Nepal?", "output": "Mount Everest."},
] * 2


@pytest.fixture(scope="module")
def store(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("instructions")
    rows = [{**row, "instruction": f"{row['instruction']} ({i})"} for i, row in enumerate(ROWS)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_script(
        "scripts/prepare_instructions.py", "--source", directory / "rows.jsonl", "--checkpoint_dir", tiny_checkpoint,
        "--data_dir", directory / "store", "--style", "alpaca", "--val_fraction", 0.25,
    )  # fmt: skip
    return directory / "store"


def tokens(length: int = 24) -> torch.Tensor:
    return torch.randint(3, 320, (2, length), generator=torch.Generator().manual_seed(0))


def random_adapter(checkpoint: Path, directory: Path, **options) -> torch.Tensor:
    """Writes an adapter whose update is not zero; returns the logits of base + adapter."""
    model = load_model(checkpoint, torch.float32)
    inject_lora(model, LoRAConfig(**options))
    torch.manual_seed(1)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, directory)
    return model(tokens()).detach()


@pytest.mark.parametrize("packed", [True, False])
def test_lora_trains_and_its_style_is_used_unasked(tiny_checkpoint: Path, store: Path, tmp_path: Path, packed: bool):
    out = tmp_path / "out"
    base = ("--checkpoint_dir", tiny_checkpoint)
    run_script("finetune/lora.py", *base, "--data_dir", store, "--out_dir", out, *SHORT, "--train.packed", packed,
               "--probe_file", store / "val_questions.jsonl", "--train.learning_rate", 1e-2)  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["val_loss"] < report["before"]["val_loss"]
    settings = yaml.safe_load((out / "lit_config.yaml").read_text())
    assert settings["eval"]["probe_style"] == "alpaca"
    output = run_script("scripts/evaluate.py", *base, "--adapter_dir", out, "--data_dirs", f"{{val: {store}}}",
                        "--sequence_length", 240, "--dtype", "fp32").stdout  # fmt: skip
    assert json.loads(output)["perplexity"]["val"]["loss"] == pytest.approx(report["after"]["val_loss"], rel=1e-6)
    asked = (
        "--prompt",
        "Name the capital of Norway. (0)",
        "--max_new_tokens",
        8,
        "--temperature",
        0,
        "--dtype",
        "fp32",
    )
    unasked = run_script("generate/lora.py", *base, "--adapter_dir", out, *asked).stdout
    assert unasked == run_script("generate/lora.py", *base, "--adapter_dir", out, *asked, "--style", "alpaca").stdout
    assert unasked != run_script("generate/lora.py", *base, "--adapter_dir", out, *asked, "--style", "chatml").stdout


def test_an_interrupted_run_on_padded_examples_ends_the_same(tiny_checkpoint: Path, store: Path, tmp_path: Path):
    options = ("--checkpoint_dir", tiny_checkpoint, "--data_dir", store, *SHORT, "--train.packed", False,
               "--train.global_batch_size", 3, "--train.micro_batch_size", 2, "--lora.dropout", 0.1)  # fmt: skip
    run_script("finetune/lora.py", *options, "--out_dir", tmp_path / "whole")
    command = [sys.executable, "finetune/lora.py", *map(str, options), "--out_dir", str(tmp_path / "again")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "again/state/state.json").is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait()
    run_script("finetune/lora.py", *options, "--out_dir", tmp_path / "again", "--resume", True)
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_full_finetuning_leaves_a_checkpoint_with_its_chat_template(tiny_checkpoint: Path, store: Path, tmp_path: Path):
    out = tmp_path / "out"
    run_script("finetune/full.py", "--checkpoint_dir", tiny_checkpoint, "--data_dir", store, "--out_dir", out, *SHORT)
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["val_loss"] < report["before"]["val_loss"]
    assert report["trainable_parameters"] == report["total_parameters"]
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("### Instruction:\nHi\n\n### Response:")
    theirs = AutoModelForCausalLM.from_pretrained(out / "checkpoint", dtype=torch.float32)
    ours = load_model(out / "checkpoint", torch.float32)
    assert torch.allclose(ours(tokens()), theirs(tokens()).logits, atol=1e-5)


def test_a_new_adapter_on_a_frozen_one_is_one_adapter(tiny_checkpoint: Path, tmp_path: Path) -> None:
    below = random_adapter(tiny_checkpoint, tmp_path / "below", r=4, alpha=6, targets=["q_proj", "down_proj"])
    model = load_model(tiny_checkpoint, torch.float32)
    stack_lora(model, LoRAConfig(r=3, alpha=5), tmp_path / "below")
    assert torch.allclose(model(tokens()), below, atol=1e-5)
    trained = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert all(".lora_" in name for name in trained) and len(trained) == 2 * 2 * 7
    frozen = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(tokens()).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 1e-3 * parameter.grad.sign()
    assert all(torch.equal(frozen[name], buffer) for name, buffer in model.named_buffers())
    expected = model(tokens()).detach()
    assert not torch.allclose(expected, below, atol=1e-3)

    save_adapter(model, tmp_path / "both")
    ours = load_model(tiny_checkpoint, torch.float32)
    load_adapter(ours, tmp_path / "both")
    assert torch.allclose(ours(tokens()), expected, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "both")
    assert torch.allclose(theirs(tokens()).logits, expected, atol=1e-5)
    ranks = {len(layer.lora_A) for _, layer in lora_layers(ours)}
    assert ranks == {3, 7}


def test_what_cannot_be_stacked_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    random_adapter(tiny_checkpoint, tmp_path / "dora", r=2, dora=True)
    random_adapter(tiny_checkpoint, tmp_path / "all", r=2)
    with pytest.raises(InputError, match="DoRA and modules_to_save cannot be stacked: merge it first"):
        stack_lora(load_model(tiny_checkpoint, torch.float32), LoRAConfig(), tmp_path / "dora")
    with pytest.raises(InputError, match=r"adapts model.layers.0.mlp.down_proj, which the new adapter does not"):
        stack_lora(load_model(tiny_checkpoint, torch.float32), LoRAConfig(targets=["q_proj"]), tmp_path / "all")


@pytest.mark.parametrize("mode", ["stack", "continue", "merge"])
def test_a_run_on_top_of_an_adapter(tiny_checkpoint: Path, store: Path, tmp_path: Path, mode: str) -> None:
    below = random_adapter(tiny_checkpoint, tmp_path / "below", r=4)
    out, merged = tmp_path / "out", tmp_path / "merged"
    process = run_script(
        "finetune/lora.py", "--checkpoint_dir", tiny_checkpoint, "--data_dir", store, "--out_dir", out, *SHORT,
        "--start_adapter", tmp_path / "below", "--start_mode", mode, "--lora.r", 5,
        *(("--merged_dir", merged) if mode == "merge" else ()),
    )  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["val_loss"] < report["before"]["val_loss"], process.stderr
    served = merged if mode == "merge" else tiny_checkpoint
    model = load_model(served, torch.float32)
    if mode == "merge":
        assert torch.allclose(model(tokens()), below, atol=1e-5)
    load_adapter(model, out)
    assert {len(layer.lora_A) for _, layer in lora_layers(model)} == {{"stack": 9, "continue": 4, "merge": 5}[mode]}
    output = run_script("scripts/evaluate.py", "--checkpoint_dir", served, "--adapter_dir", out, "--data_dirs",
                        f"{{val: {store}}}", "--sequence_length", 240, "--dtype", "fp32").stdout  # fmt: skip
    assert json.loads(output)["perplexity"]["val"]["loss"] == pytest.approx(report["after"]["val_loss"], rel=1e-5)


def test_start_mode_merge_needs_a_place(tiny_checkpoint: Path, store: Path, tmp_path: Path) -> None:
    random_adapter(tiny_checkpoint, tmp_path / "below", r=4)
    process = run_script(
        "finetune/lora.py", "--checkpoint_dir", tiny_checkpoint, "--data_dir", store, "--out_dir", tmp_path / "out",
        "--start_adapter", tmp_path / "below", "--start_mode", "merge", check=False,
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr.strip().splitlines()[-1] == (
        "error: start_mode merge needs --merged_dir, where the merged base is written"
    )
    assert not (tmp_path / "out").exists()
