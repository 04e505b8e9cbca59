"""Scripts that train a tree of LoRA adapters, and what takes it: learn, stop, go on, serve, alone and two together."""

import csv
import json
import math
import os
import signal
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT, TEXT, run_script, warm_python
from distributed_worker import run_all
from safetensors.torch import load_file

from lit_llama.checkpoint import load_model
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore, TokenStoreWriter
from lit_llama.errors import InputError
from lit_llama.generation import GREEDY, generate
from lit_llama.lora import LoRAConfig, inject_lora, load_adapter, merge_lora
from lit_llama.lora_tree import LoRATreeConfig, leaf_counts, router_logits, routing_figures
from lit_llama.lora_tree_routing import descend
from lit_llama.optimizer import Optimizer
from lit_llama.prompts import encode_prompt
from lit_llama.run_files import RunFiles, RunState
from lit_llama.tokenizer import Tokenizer
from scripts.plot_routing import COLORS, pieces_of

SCRIPT, ADAPTER = "pretrain/lora_tree.py", "adapter_model.safetensors"
SHORT = {
    "accelerator": "cpu", "precision": "fp32", "train.max_steps": 6, "train.learning_rate": 1e-2,
    "train.sequence_length": 32, "train.warmup_steps": 0, "train.micro_batch_size": 2, "eval.interval": 2,
    "eval.batch_size": 2, "lora_tree.depth": 2, "lora_tree.r": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("stores") / "domain"
    random = torch.Generator().manual_seed(0)
    tokenizer = Tokenizer.from_checkpoint(tiny_checkpoint)
    with TokenStoreWriter(data_dir, tokenizer.vocab_size, tokenizer.sha256, str(tiny_checkpoint)) as writer:
        for number in range(24):
            length, start = (int(torch.randint(low, 60, (), generator=random)) for low in (20, 3))
            ids = (start + 7 * torch.arange(length)) % 300 + 3
            writer.add("train" if number < 16 else "val", ids.numpy(), num_words=length, num_bytes=4 * length)
    return data_dir


def options(**given: object) -> list[str]:
    return [str(part) for name, value in {**SHORT, **given}.items() for part in (f"--{name}", value)]


def in_this_process(script: str, directory: Path, **given: object) -> None:
    """Run a script's main, without waiting for another Python to start."""
    directory.mkdir(parents=True, exist_ok=True)
    specification = directory / "run.json"
    specification.write_text(json.dumps([[script, {name: str(value) for name, value in given.items()}]]))
    run_all(specification)


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tree"
    run_script(SCRIPT, *options(checkpoint_dir=tiny_checkpoint, data_dir=store, out_dir=out))
    return out


def test_a_run_learns_and_is_evaluated_and_served_as_reported(
    run: Path, tiny_checkpoint: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    report = json.loads((run / "report.json").read_text())
    after = report["after"]
    assert after["val_loss"] < report["before"]["val_loss"]
    assert {"router_entropy", "router_decided", "leaf_use", "dead_leaves"} <= after.keys()
    given = {"checkpoint_dir": tiny_checkpoint, "adapter_dir": run, "dtype": "fp32", "device": "cpu"}
    capsys.readouterr()
    scoring = {"data_dirs": f"{{val: {store}}}", "sequence_length": 32}
    in_this_process("scripts/evaluate.py", tmp_path, **given, **scoring)
    scored = json.loads(capsys.readouterr().out)["perplexity"]["val"]["loss"]
    assert scored == pytest.approx(after["val_loss"], rel=1e-6)
    in_this_process("generate/lora.py", tmp_path, **given, prompt="Norway", style="plain", max_new_tokens=6)
    said = capsys.readouterr().out
    model, tokenizer = load_model(tiny_checkpoint, torch.float32), Tokenizer.from_checkpoint(tiny_checkpoint)
    load_adapter(model, run)
    prompt = encode_prompt(tokenizer, "plain", "Norway", None)
    assert said.strip() == tokenizer.decode(generate(model.eval(), prompt, 6, GREEDY, tokenizer.stop_ids)[0]).strip()


def test_a_run_stopped_on_the_way_ends_with_the_same_bytes(
    run: Path, tiny_checkpoint: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunFiles.save

    def save_and_be_told_to_stop(self: RunFiles, optimizer: Optimizer, state: RunState) -> None:
        save(self, optimizer, state)
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    given = {**SHORT, "checkpoint_dir": tiny_checkpoint, "data_dir": store, "out_dir": tmp_path / "again"}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(RunFiles, "save", save_and_be_told_to_stop)
        in_this_process(SCRIPT, tmp_path, **given)
    assert not (tmp_path / "again/report.json").exists()
    in_this_process(SCRIPT, tmp_path, **given, resume="true")
    assert (tmp_path / "again" / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()


def test_finetuning_on_instructions_and_the_laboratory_take_a_tree(tiny_checkpoint: Path, tmp_path: Path) -> None:
    base, tokenizer = {"checkpoint_dir": tiny_checkpoint}, Tokenizer.from_checkpoint(tiny_checkpoint)
    extra = {"examples": True, "style": "alpaca", "system": None}
    with TokenStoreWriter(tmp_path / "store", tokenizer.vocab_size, tokenizer.sha256, "rows", extra=extra) as writer:
        for number in range(8):
            prompt, answer = tokenizer.encode(f"Name a capital. ({number})"), tokenizer.encode("Oslo.")
            writer.add("train" if number < 6 else "val", prompt + answer, [0] * len(prompt) + [1] * len(answer))
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/a.txt").write_text(TEXT)
    short = {**SHORT, "train.sequence_length": 64, "train.max_steps": 4}
    by_sequence = {"lora_tree.route_by": "sequence", "quantize": "nf4"}
    arguments = options(**base, **short, **by_sequence, data_dir=tmp_path / "store", out_dir=tmp_path / "tuned")
    run_script("finetune/lora_tree.py", *arguments)
    in_this_process(
        "finetune/inject.py", tmp_path, **base, **short, documents=tmp_path / "documents", recipe="raw",
        learner="lora_tree", out_dir=tmp_path / "injected", cache_dir=tmp_path / "cache",
    )  # fmt: skip
    for out in ("tuned", "injected"):
        report = json.loads((tmp_path / out / "report.json").read_text())
        assert report["after"]["val_loss"] < report["before"]["val_loss"], out
        load_adapter(load_model(tiny_checkpoint, torch.float32), tmp_path / out)


def test_the_leaf_of_each_word_is_drawn(
    run: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, text in (("a", "The coast <is> long.\n"), ("b", "Das Ä ist kurz.")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    texts, out = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], tmp_path / "routing.svg"
    in_this_process(
        "scripts/plot_routing.py", tmp_path, checkpoint_dir=tiny_checkpoint, adapter_dir=run,
        text_files=json.dumps(texts), out=out, router="layers.1.mlp",
    )  # fmt: skip
    elements = list(ElementTree.parse(out).getroot())
    title = next(place for place, element in enumerate(elements) if element.text == "b")
    drawn = [(box.get("fill"), words.text) for box, words in zip(*[iter(elements[title + 1 :])] * 2, strict=True)]
    model, tokenizer = load_model(tiny_checkpoint), Tokenizer.from_checkpoint(tiny_checkpoint)
    load_adapter(model, run)
    ids = tokenizer.encode("Das Ä ist kurz.")
    leaves = descend(router_logits(model, torch.tensor([ids]))["layers.1.mlp"][0]).tolist()
    pieces = zip(leaves, pieces_of(tokenizer, ids), strict=True)
    assert drawn == [(COLORS[leaf], piece) for leaf, piece in pieces if piece]
    assert "".join(text for _, text in drawn) == "Das Ä ist kurz."
    broken = {"adapter_dir": run, "text_files": json.dumps(texts), "out": tmp_path / "b.svg", "router": "root"}
    line = refusal(capsys, "scripts/plot_routing.py", tmp_path, checkpoint_dir=tiny_checkpoint, **broken)
    assert "--router 'root': there are layers.0.self_attn" in line


def refusal(capsys: pytest.CaptureFixture, script: str, directory: Path, **given: object) -> str:
    """The one line with which a script refuses its arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        in_this_process(script, directory, **given)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and line.startswith("error: ")
    return line


def test_what_is_refused(
    run: Path,
    tiny_checkpoint: Path,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = {"checkpoint_dir": tiny_checkpoint}
    line = refusal(capsys, "scripts/merge_lora.py", tmp_path, **base, adapter_dir=run, out_dir=tmp_path / "out")
    assert "is no change of the base's weights" in line or "cannot be merged" in line
    given = {**SHORT, **base, "data_dir": store, "out_dir": tmp_path / "out"}
    line = refusal(capsys, SCRIPT, tmp_path, **{**given, "lora_tree.depth": 40})
    assert "lora_tree.depth 40: 1,099,511,627,776 leaves of rank 2 take" in line
    with monkeypatch.context() as patch:
        patch.setattr("lit_llama.lora_tree.free_memory_gb", lambda device: 1e-6)
        assert (
            "depth 2: 4 leaves of rank 2 take 0.0 GB (weights, gradients and optimizer), cpu has 0.0 GB free"
            in refusal(capsys, SCRIPT, tmp_path, **given)
        )
    assert "train.compile does not go" in refusal(capsys, SCRIPT, tmp_path, **given, **{"train.compile": "true"})
    assert not (tmp_path / "out").exists()

    model = load_model(tiny_checkpoint, torch.float32)
    load_adapter(model, run)
    with pytest.raises(InputError, match="a tree routed by token cannot be merged: each token takes another leaf"):
        merge_lora(model)
    with pytest.raises(InputError, match="carries an adapter already"):
        inject_lora(model, LoRAConfig())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"depth": -1}, r"depth -1 is not from 0 \(plain LoRA\) to 40"),
        ({"depth": 4000}, "depth 4000 is not from 0"),
        ({"scope": "layer"}, "scope 'layer' is not one of block, linear, model"),
        ({"route_by": "word"}, "route_by 'word' is not one of token, sequence"),
        ({"router": "hash"}, "router 'hash' is not one of tree, softmax, frozen, given"),
        ({"targets": ["lm_head"]}, "targets 'lm_head' is no linear layer of a block"),
        ({"targets": []}, "targets is empty"),
        ({"r": 0}, "r 0 must be at least 1"),
        ({"depth": 1, "router": "softmax", "top_k": 3}, "top_k 3 is more than the 2 leaves"),
        ({"scope": "linear", "route_by": "sequence"}, "use block or model with sequence"),
        ({"region_leak": 0.6}, r"region_leak 0.6 is not in \[0, 0.5\]"),
        ({"train_hardened": 0.9}, "together below 1"),
    ],
)
def test_wrong_settings_are_named(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoRATreeConfig(**values)


def test_figures_of_a_text(run: Path, tiny_checkpoint: Path, store: Path) -> None:
    model = load_model(tiny_checkpoint, torch.float32)
    load_adapter(model, run)
    windows = TrainingWindows(TokenStore.open(store, "val"), 32, seed=0, shuffle=False)
    counts = leaf_counts(model, windows, max_windows=1000)
    targets = sum(int((windows[i].labels != -100).sum()) for i in range(windows.windows_per_epoch))
    assert counts.shape == (4, 4) and (counts.sum(1) == targets).all()
    figures = routing_figures(model, windows)
    assert 0 <= figures["router_entropy"] <= math.log(2) and 0 <= figures["leaf_use"] <= 1


def test_two_processes_learn_what_one_learns(tiny_checkpoint: Path, store: Path, tmp_path: Path) -> None:
    # The balance is that of a micro-batch, which is not the same ones over two processes.
    common = {**SHORT, "checkpoint_dir": tiny_checkpoint, "data_dir": store, "lora_tree.balance_weight": 0}
    in_this_process(SCRIPT, tmp_path, **common, out_dir=tmp_path / "one")
    two = [
        [SCRIPT, {name: str(value) for name, value in {**common, **own}.items()}]
        for own in (
            {"out_dir": tmp_path / "ddp", "devices": 2, "strategy": "ddp"},
            {"out_dir": tmp_path / "fsdp", "devices": 2, "strategy": "fsdp", "quantize": "int8"},
        )
    ]
    (tmp_path / "two.json").write_text(json.dumps(two))
    torchrun = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*torchrun, ROOT / "tests/distributed_worker.py", tmp_path / "two.json"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-5000:]
    one = load_file(tmp_path / "one" / ADAPTER)
    for strategy, tolerance in (("ddp", 1e-3), ("fsdp", 5e-2)):  # the latter's base is rounded to int8
        other = load_file(tmp_path / strategy / ADAPTER)
        assert {name: tensor.shape for name, tensor in one.items()} == {n: t.shape for n, t in other.items()}
        losses = []
        for out in ("one", strategy):
            with open(tmp_path / out / "metrics.csv") as file:
                losses.append(
                    [float(row[name]) for row in csv.DictReader(file) for name in row if "_loss" in name and row[name]]
                )
        assert losses[1] == pytest.approx(losses[0], rel=tolerance)
