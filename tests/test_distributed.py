"""Two processes against one: losses, adapters and checkpoints, resume on another number, streams read by both."""

import csv
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, warm_python
from distributed_worker import run_all
from safetensors.torch import load_file

from lit_llama.data.layouts import IGNORE_INDEX, PADDING_DOCUMENT, Window
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.streaming import StreamedWindows, decode_window, encode_window, write_stream
from lit_llama.data.token_store import TokenStore, TokenStoreWriter
from lit_llama.errors import InputError
from lit_llama.optimizer import Optimizer
from lit_llama.tokenizer import Tokenizer

STRATEGIES = ("ddp", "fsdp")
QUANTIZATIONS = ("nf4-dq", "int8")


@pytest.fixture(scope="module")
def store(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token store whose held-out batches do not divide evenly over two processes."""
    data_dir = tmp_path_factory.mktemp("stores") / "domain"
    random = np.random.default_rng(0)
    tokenizer = Tokenizer.from_checkpoint(tiny_checkpoint)
    with TokenStoreWriter(data_dir, tokenizer.vocab_size, tokenizer.sha256, str(tiny_checkpoint)) as writer:
        for number in range(24):
            tokens = (random.integers(3, 320) + 7 * np.arange(random.integers(5, 60))) % 300 + 3
            split = "train" if number < 16 else "val"
            writer.add(split, tokens, num_words=len(tokens), num_bytes=4 * len(tokens))
    return data_dir


@pytest.fixture(scope="module")
def stream(store: Path) -> Path:
    """Six chunks of the training documents in their order, three of the others."""
    stream_dir = store.parent / "stream"
    run_script(
        "scripts/stream_corpus.py", "--data_dir", store, "--stream_dir", stream_dir, "--sequence_length", 32,
        "--seed", "null", "--chunk_megabytes", 200e-6,
    )  # fmt: skip
    return stream_dir


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Path, store: Path, stream: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories NAME-1 of one process and NAME-2 of two, by the same commands otherwise.

    "resumed" is a run of four steps: one on one process, two on two (FSDP), and one on one.
    """
    directory = tmp_path_factory.mktemp("runs")
    probes = directory / "probes.jsonl"
    probes.write_text('{"question": "What is the capital of Norway?", "answers": ["Oslo"]}\n')

    def options(name: str, processes: int, strategy: str = "auto", **others: object) -> dict[str, object]:
        common = {
            "checkpoint_dir": tiny_checkpoint, "data_dir": store, "out_dir": directory / f"{name}-{processes}",
            "accelerator": "cpu", "devices": processes, "strategy": strategy, "precision": "fp32",
            "train.max_steps": 4, "train.learning_rate": 1e-2, "train.sequence_length": 32, "eval.interval": 2,
            "train.warmup_steps": 0, "train.final_learning_rate": 1, "train.micro_batch_size": 2,
            "eval.batch_size": 2, "eval.probe_tokens": 4, "probe_file": probes, "replay.data_dir": store,
        }  # fmt: skip
        return {key: str(value) for key, value in {**common, **others}.items()}

    lora, full = "pretrain/lora.py", "pretrain/full.py"
    in_bf16 = {"precision": "bf16", "train.learning_rate": 1e-3}
    resumed = {"out_dir": directory / "resumed"}
    one = [
        (lora, options("lora", 1)),
        (full, options("full", 1, **in_bf16)),
        (lora, options("streamed", 1, data_dir=stream)),
        *((lora, options(mode, 1, quantize=mode)) for mode in QUANTIZATIONS),
        (lora, options("", 1, **resumed, **{"train.max_steps": 1})),
    ]
    two = [
        *((lora, options(strategy, 2, strategy)) for strategy in STRATEGIES),
        (full, options("full", 2, "fsdp", **in_bf16)),
        (lora, options("streamed", 2, "ddp", data_dir=f"local:{stream}")),
        *((lora, options(mode, 2, "fsdp", quantize=mode)) for mode in QUANTIZATIONS),
        (lora, options("", 2, "fsdp", **resumed, **{"train.max_steps": 3}, resume="true")),
    ]
    run_in_this_process(one, directory)
    launch(two, directory)
    run_in_this_process([(lora, options("", 1, **resumed, resume="true"))], directory)
    return directory


def launch(commands: list[tuple[str, dict[str, str]]], directory: Path) -> str:
    """Run commands in two processes; returns what they wrote to stderr."""
    specification = directory / "two.json"
    specification.write_text(json.dumps(commands))
    torchrun = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*torchrun, ROOT / "tests/distributed_worker.py", specification],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(directory)},  # litdata's cache is in the home directory
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-9000:]
    return process.stderr


def run_in_this_process(commands: list[tuple[str, dict[str, str]]], directory: Path) -> None:
    (directory / "one.json").write_text(json.dumps(commands))
    run_all(directory / "one.json")


def rows(out_dir: Path) -> list[dict[str, str]]:
    with open(out_dir / "metrics.csv") as file:
        return list(csv.DictReader(file))


FIGURES = ("train_loss", "gradient_norm", "val_loss", "general_loss", "val_bits_per_byte", "probe_accuracy", "tokens")


def assert_same_figures(one: Path, two: Path, tolerance: float, names: tuple[str, ...] = FIGURES) -> None:
    for row, other in zip(rows(one), rows(two), strict=True):
        for name in names:
            assert bool(row.get(name)) == bool(other.get(name)), name
            if row.get(name):
                assert float(other[name]) == pytest.approx(float(row[name]), rel=tolerance), (row["step"], name)


def assert_same_tensors(one: Path, two: Path, tolerance: float) -> None:
    tensors, others = load_file(one), load_file(two)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_what_one_does(strategy: str, runs: Path) -> None:
    assert_same_figures(runs / "lora-1", runs / f"{strategy}-2", 2e-6)
    for name in ("adapter_model.safetensors", "best/adapter_model.safetensors"):
        assert_same_tensors(runs / "lora-1" / name, runs / f"{strategy}-2" / name, 1e-4)
    losses = [float(row["val_loss"]) for row in rows(runs / "lora-1") if row["val_loss"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_a_sharded_quantized_base_trains_what_a_whole_one_does(mode: str, runs: Path) -> None:
    assert_same_figures(runs / f"{mode}-1", runs / f"{mode}-2", 2e-6)
    assert_same_tensors(*(runs / f"{mode}-{n}/adapter_model.safetensors" for n in (1, 2)), 1e-4)


def test_all_weights_sharded_with_masters(runs: Path) -> None:
    assert_same_figures(runs / "full-1", runs / "full-2", 2e-3)  # bf16
    assert_same_tensors(*(runs / f"full-{n}/checkpoint/model.safetensors" for n in (1, 2)), 2e-2)


def test_a_run_goes_on_with_another_number_of_processes(runs: Path) -> None:
    trained = ("train_loss", "gradient_norm", "tokens")  # it was also evaluated where it stopped
    assert_same_figures(runs / "lora-1", runs / "resumed", 2e-6, trained)
    assert_same_tensors(runs / "lora-1/adapter_model.safetensors", runs / "resumed/adapter_model.safetensors", 1e-4)


def test_state_is_whole_whatever_the_strategy(runs: Path) -> None:
    one, two = (load_file(next((runs / name / "state").glob("*.safetensors"))) for name in ("lora-1", "fsdp-2"))
    assert one.keys() | {"random.1"} == two.keys()
    for name, tensor in one.items():
        assert tensor.shape == two[name].shape and tensor.dtype == two[name].dtype, name


def test_a_stream_is_read_by_two_processes_as_by_one(runs: Path) -> None:
    assert_same_figures(runs / "streamed-1", runs / "streamed-2", 2e-6)
    assert list(runs.glob(".lightning/chunks/*/*/chunk-*.bin")), "the two processes did not go through the cache"
    losses = [row["train_loss"] for row in rows(runs / "streamed-1")]
    assert losses != [row["train_loss"] for row in rows(runs / "lora-1")]  # another order than the store's


def sha256(store: Path) -> str:
    return TokenStore.open(store, "train").meta["tokenizer"]["sha256"]


def same(window: Window, other: Window) -> bool:
    return all(
        np.array_equal(one, two) and one.dtype == two.dtype for one, two in zip(window[:4], other[:4], strict=True)
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_unshuffled_stream_is_the_token_store(split: str, store: Path, stream: Path) -> None:
    windows = TrainingWindows(TokenStore.open(store, split), 32, seed=0, shuffle=False)
    streamed = StreamedWindows(str(stream), split, 32, sha256(store), seed=0, shuffle=False)
    assert streamed.windows_per_epoch == windows.windows_per_epoch
    assert streamed.bytes_per_target == pytest.approx(windows.bytes_per_target)
    assert all(same(streamed[i], windows[i]) for i in range(2 * windows.windows_per_epoch))


def test_a_shuffled_stream_has_each_window_once_an_epoch_in_an_order_of_its_own(store: Path, stream: Path) -> None:
    windows = TrainingWindows(TokenStore.open(store, "train"), 32, seed=0, shuffle=False)
    count = windows.windows_per_epoch
    assert len(list((stream / "train").glob("chunk-*.bin"))) > 4  # more than are shuffled together

    def epoch(number: int, seed: int) -> list[bytes]:
        streamed = StreamedWindows(str(stream), "train", 32, sha256(store), seed=seed)
        return [np.stack(streamed[i][:4]).tobytes() for i in range(number * count, (number + 1) * count)]

    stored = sorted(np.stack(windows[i][:4]).tobytes() for i in range(count))
    orders = [epoch(number, seed) for number in (0, 1) for seed in (0, 1)]
    assert all(sorted(order) == stored for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    streamed = StreamedWindows(str(stream), "train", 32, sha256(store), seed=1)
    mixed = np.random.default_rng(0).permutation(2 * count)  # whatever is asked for before
    both = epoch(0, 1) + epoch(1, 1)
    assert all(np.stack(streamed[int(i)][:4]).tobytes() == both[i] for i in mixed)


def test_replay_comes_at_even_distances(store: Path, stream: Path) -> None:
    replay = TokenStore.open(store, "val")
    streamed = StreamedWindows(str(stream), "train", 32, sha256(store), 0, replay, replay_ratio=0.25)
    replayed = TrainingWindows(replay, 32, seed=0)
    expected = [replayed[i] for i in range(2 * streamed.replay_windows)]
    places = []
    for index in range(2 * streamed.windows_per_epoch):
        if expected and same(streamed[index], expected[0]):
            places.append(index)
            expected.pop(0)
    assert not expected
    assert streamed.replay_windows / streamed.windows_per_epoch == pytest.approx(0.25, abs=0.02)
    assert set(np.diff(places)) <= {3, 4, 5}


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_window_with_ignored_labels_and_padding_comes_back(dtype: str) -> None:
    window = Window(
        np.array([5, 6, 7, 9, 11, 0, 0]),
        np.array([6, IGNORE_INDEX, 8, IGNORE_INDEX, 12, IGNORE_INDEX, IGNORE_INDEX]),
        np.array([0, 1, 2, 0, 0, 0, 0]),
        np.array([0, 0, 0, 1, 2, PADDING_DOCUMENT, PADDING_DOCUMENT]),
    )
    assert same(decode_window(encode_window(window, np.dtype(dtype)), 7, np.dtype(dtype)), window)


def test_a_stream_with_masked_tokens_and_a_seed(store: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    with TokenStoreWriter(tmp_path / "masked", 70_000, sha256(store), "here") as writer:
        for _ in range(9):
            tokens = random.integers(0, 70_000, 40)
            writer.add("train", tokens, random.integers(0, 2, 40))
    write_stream(tmp_path / "masked", tmp_path / "stream", 16, seed=3, chunk_bytes=1000, overwrite=False)
    windows = TrainingWindows(TokenStore.open(tmp_path / "masked", "train"), 16, seed=3)
    streamed = StreamedWindows(str(tmp_path / "stream"), "train", 16, sha256(store), seed=0, shuffle=False)
    assert all(same(streamed[i], windows[i]) for i in range(windows.windows_per_epoch))
    assert streamed.bytes_per_target is None


def test_misuse_of_a_stream_is_one_line(store: Path, stream: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pass --train.sequence_length 32"):
        StreamedWindows(str(stream), "train", 64, sha256(store), seed=0)
    with pytest.raises(InputError, match="another tokenizer"):
        StreamedWindows(str(stream), "train", 32, "0" * 64, seed=0)
    with pytest.raises(InputError, match="exists already"):
        write_stream(store, stream, 32, None, 1000, overwrite=False)
    with pytest.raises(InputError, match="no stream can be read there"):
        StreamedWindows(str(tmp_path / "nothing"), "train", 32, sha256(store), seed=0)


def test_a_skipped_step_changes_nothing() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = Optimizer(model, weight_decay=0.1, betas=(0.9, 0.95))
    for value in (1.0, float("nan"), 1.0):
        before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
        skip = torch.tensor(float(value != value))
        model(torch.full((2, 4), value)).sum().backward()
        optimizer.step(0.1, skip=skip)
        unchanged = [torch.equal(before.get(name, torch.tensor(0)), t) for name, t in optimizer.state_tensors().items()]
        assert all(unchanged) if skip else not any(unchanged)
