"""Training windows against a plain-Python account of which (input, target) pairs an epoch must hold."""

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_llama.data.layouts import IGNORE_INDEX
from lit_llama.data.packing import TrainingWindows, collate
from lit_llama.data.token_store import TokenStore, TokenStoreWriter
from lit_llama.errors import InputError

ODD_LENGTHS = (1, 17, 2, 40, 1, 3, 129, 5, 2, 61)


def make_store(
    data_dir: Path, lengths=ODD_LENGTHS, first: int = 0, mask: bool = False, sha: str = "a", groups=None
) -> TokenStore:
    """Documents of the given lengths in which every token of the store is another number, counted up from `first`."""
    random = np.random.default_rng(7)
    with TokenStoreWriter(data_dir, 100_000, sha * 64, "test") as writer:
        for length, group in zip(lengths, groups or [None] * len(lengths), strict=True):
            learn = random.integers(0, 2, length) if mask else None
            writer.add("train", np.arange(first, first + length), learn, group=group)
            first += length
    return TokenStore.open(data_dir, "train")


def pairs_of(store: TokenStore) -> Counter:
    """Every (token, next token in the document, is it learned) of the store, by a plain loop."""
    pairs = Counter()
    for i in range(store.num_documents):
        tokens, mask = store.document(i)
        for j in range(1, len(tokens)):
            pairs[int(tokens[j - 1]), int(tokens[j]) if mask is None or mask[j] else -100] += 1
    return pairs


def pairs_in(windows: list) -> Counter:
    return Counter(
        (int(token), int(label))
        for window in windows
        for token, label, document in zip(window.input_ids, window.labels, window.document_ids, strict=True)
        if document != -1
    )


def epoch_of(windows: TrainingWindows, epoch: int) -> list:
    return [windows[i] for i in range(epoch * windows.windows_per_epoch, (epoch + 1) * windows.windows_per_epoch)]


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 16, 64, 250, 251, 252, 1000])
def test_each_token_is_a_target_exactly_once_an_epoch(tmp_path: Path, length: int, mask: bool) -> None:
    store = make_store(tmp_path / "store", mask=mask)
    windows = TrainingWindows(store, length, seed=3)
    total = sum(n - 1 for n in ODD_LENGTHS)
    assert windows.windows_per_epoch == -(-total // length)
    for epoch in range(3):
        assert pairs_in(epoch_of(windows, epoch)) == pairs_of(store)


@pytest.mark.parametrize("length", [5, 32])
def test_a_window_is_made_of_whole_runs_of_documents(tmp_path: Path, length: int) -> None:
    store = make_store(tmp_path / "store")
    documents = np.repeat(np.arange(store.num_documents), np.diff(store.offsets))
    padding = 0
    for window in epoch_of(TrainingWindows(store, length, seed=1), 0):
        assert all(field.dtype == np.int64 and field.shape == (length,) for field in window[:4])
        real = window.document_ids != -1
        count = int(real.sum())
        assert real[:count].all()  # padding comes last
        padding += length - count
        assert (window.labels[count:] == -100).all()
        for segment in range(window.document_ids[:count].max() + 1):
            (where,) = np.nonzero(window.document_ids == segment)
            assert len(where) and (np.diff(where) == 1).all()
            assert len(set(documents[window.input_ids[where]])) == 1
            assert window.position_ids[where].tolist() == list(range(len(where)))
            assert (np.diff(window.input_ids[where]) == 1).all()
    assert 0 <= padding < length  # only the last window of the epoch is padded


def test_without_shuffling_windows_follow_the_store_and_continue_cut_documents(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", lengths=[4, 1, 9])
    windows = TrainingWindows(store, 5, seed=0, shuffle=False)
    assert windows.windows_per_epoch == 3
    first, second, third = (windows[i] for i in range(3))
    assert first.input_ids.tolist() == [0, 1, 2, 5, 6] and first.labels.tolist() == [1, 2, 3, 6, 7]
    assert first.position_ids.tolist() == [0, 1, 2, 0, 1] and first.document_ids.tolist() == [0, 0, 0, 1, 1]
    assert second.input_ids.tolist() == [7, 8, 9, 10, 11] and second.labels.tolist() == [8, 9, 10, 11, 12]
    assert third.labels.tolist() == [13, -100, -100, -100, -100]
    assert third.document_ids.tolist() == [0, -1, -1, -1, -1]
    assert same(windows[4], second)


def test_one_document_longer_than_many_windows_and_a_store_smaller_than_one(tmp_path: Path) -> None:
    long = TrainingWindows(make_store(tmp_path / "long", lengths=[1001]), 64, seed=0)
    assert long.windows_per_epoch == 16
    assert sorted(label for w in epoch_of(long, 2) for label in w.labels.tolist() if label != -100) == [*range(1, 1001)]
    small = TrainingWindows(make_store(tmp_path / "small", lengths=[3, 2]), 64, seed=0)
    assert small.windows_per_epoch == 1
    assert (small[5].labels != -100).sum() == 3


def test_epochs_differ_in_order_of_documents_and_of_windows(tmp_path: Path) -> None:
    windows = TrainingWindows(make_store(tmp_path / "store", lengths=[11] * 50), 10, seed=0)  # one document a window
    orders = [[int(w.input_ids[0]) for w in epoch_of(windows, epoch)] for epoch in range(2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    one_document = TrainingWindows(make_store(tmp_path / "one", lengths=[501]), 10, seed=0)
    order = [int(w.input_ids[0]) for w in epoch_of(one_document, 0)]
    assert order != sorted(order)
    other_seed = TrainingWindows(windows.store, 10, seed=1)
    assert orders[0] != [int(w.input_ids[0]) for w in epoch_of(other_seed, 0)]


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.25, 0.5, 0.8])
def test_replay_has_its_share_and_repeats_nothing_before_it_is_through(tmp_path: Path, ratio: float) -> None:
    store = make_store(tmp_path / "domain", mask=True)
    replay = make_store(tmp_path / "replay", lengths=[90, 1, 313, 44], first=5000)
    windows = TrainingWindows(store, 8, seed=0, replay=replay, replay_ratio=ratio)
    domain = TrainingWindows(store, 8, seed=0)
    per_epoch = round(domain.windows_per_epoch * ratio / (1 - ratio))
    assert windows.windows_per_epoch == domain.windows_per_epoch + per_epoch
    replayed, places = [], []
    for epoch in range(4):
        indices = range(epoch * windows.windows_per_epoch, (epoch + 1) * windows.windows_per_epoch)
        from_replay = [i for i in indices if windows.is_replay(i)]
        assert len(from_replay) == per_epoch
        assert all((windows[i].input_ids.max() >= 5000) == windows.is_replay(i) for i in indices)
        assert pairs_in([windows[i] for i in indices if not windows.is_replay(i)]) == pairs_of(store)
        replayed += [windows[i] for i in from_replay]
        places.append([i - indices[0] for i in from_replay])
    assert places[0] != places[1]
    one_pass = TrainingWindows(replay, 8, seed=0).windows_per_epoch
    whole_passes = len(replayed) // one_pass
    for i in range(whole_passes):
        assert pairs_in(replayed[i * one_pass : (i + 1) * one_pass]) == pairs_of(replay)
    rest = pairs_in(replayed[whole_passes * one_pass :])
    assert not rest or max(rest.values()) == 1


def test_random_access_equals_sequential_access(tmp_path: Path) -> None:
    store, replay = make_store(tmp_path / "domain"), make_store(tmp_path / "replay", lengths=[50, 70], first=5000)
    arguments = dict(length=6, seed=11, replay=replay, replay_ratio=0.3)
    sequential = TrainingWindows(store, **arguments)
    expected = [sequential[i] for i in range(5 * sequential.windows_per_epoch)]
    jumping = TrainingWindows(store, **arguments)
    for i in np.random.default_rng(0).permutation(len(expected)):
        assert same(jumping[int(i)], expected[i])
    assert same(TrainingWindows(store, **arguments)[len(expected) - 1], expected[-1])


def sources_in(windows: list, store: TokenStore) -> list[list[int]]:
    """Of each window the groups of its documents, one entry a document; documents without a group are left out."""
    documents = np.repeat(np.arange(store.num_documents), np.diff(store.offsets))
    found = []
    for window in windows:
        first_tokens = [window.input_ids[window.document_ids == i][0] for i in range(window.document_ids.max() + 1)]
        found.append([int(group) for group in store.groups[documents[first_tokens]] if group >= 0])
    return found


@pytest.mark.parametrize("seed", range(12))
def test_no_window_holds_two_views_of_one_source(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    views = random.integers(1, 9, random.integers(40, 80))  # documents a source
    groups = [*np.repeat(np.arange(len(views)), views).tolist(), *[None] * int(random.integers(0, 60))]
    random.shuffle(groups)
    lengths = random.integers(1, 120, len(groups)).tolist()
    store = make_store(tmp_path / "store", lengths, mask=bool(seed % 2), groups=groups)
    windows = TrainingWindows(store, int(random.integers(8, 200)), seed)
    assert windows.windows_per_epoch == -(-sum(n - 1 for n in lengths) // windows.length)
    orders = []
    for epoch in range(3):
        drawn = epoch_of(windows, epoch)
        assert pairs_in(drawn) == pairs_of(store)
        orders.append(sources_in(drawn, store))
        assert all(len(sources) == len(set(sources)) for sources in orders[-1])
    assert orders[0] != orders[1]
    # Without the groups the same documents do meet, so the test above can fail.
    store.groups = None
    plain = epoch_of(TrainingWindows(store, windows.length, seed), 0)
    store.groups = np.array([-1 if group is None else group for group in groups])
    assert windows.length < 40 or any(len(s) != len(set(s)) for s in sources_in(plain, store))
    again = TrainingWindows(store, windows.length, seed)
    indices = random.permutation(3 * windows.windows_per_epoch)[:40]
    assert all(same(again[int(i)], windows[int(i)]) for i in indices)


def test_a_store_too_small_to_keep_views_apart_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [50] * 20, groups=[number % 2 for number in range(20)])
    epoch = epoch_of(TrainingWindows(store, 40, seed=0), 0)
    assert all(len(set(sources)) == len(sources) for sources in sources_in(epoch, store))
    with pytest.raises(InputError, match=r"store/train is too small for windows of 200 tokens.*10 views of 2 sources"):
        TrainingWindows(store, 200, seed=0)
    TrainingWindows(store, 200, seed=0, shuffle=False)  # validation keeps the store's order
    alone = make_store(tmp_path / "alone", groups=list(range(len(ODD_LENGTHS))))
    plain = make_store(tmp_path / "plain")
    assert same(TrainingWindows(alone, 500, seed=4)[3], TrainingWindows(plain, 500, seed=4)[3])


HASH = """
import hashlib, sys
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore
open_store = lambda name: TokenStore.open(sys.argv[1] + "/" + name, "train")
windows = TrainingWindows(open_store("domain"), 9, seed=5, replay=open_store("replay"), replay_ratio=0.2)
print(hashlib.sha256(b"".join(field.tobytes() for i in range(300) for field in windows[i][:4])).hexdigest())
"""


def test_every_process_gets_the_same_bytes(tmp_path: Path) -> None:
    store, replay = make_store(tmp_path / "domain"), make_store(tmp_path / "replay", lengths=[50, 70], first=5000)
    windows = TrainingWindows(store, 9, seed=5, replay=replay, replay_ratio=0.2)
    here = hashlib.sha256(b"".join(field.tobytes() for i in range(300) for field in windows[i][:4])).hexdigest()
    root = Path(__file__).parent.parent
    process = subprocess.run([sys.executable, "-c", HASH, str(tmp_path)], capture_output=True, text=True, cwd=root)
    assert process.stdout.strip() == here, process.stderr


def test_collate_stacks_into_int64_tensors(tmp_path: Path) -> None:
    windows = TrainingWindows(make_store(tmp_path / "store"), 8, seed=0)
    batch = collate([windows[i] for i in range(3)])
    assert all(tensor.shape == (3, 8) and tensor.dtype == torch.int64 for tensor in batch[:4])
    assert torch.equal(batch.labels.flatten()[batch.targets], batch.labels[batch.labels != IGNORE_INDEX])
    assert batch.labels[2].tolist() == windows[2].labels.tolist()


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    store, replay = make_store(tmp_path / "domain"), make_store(tmp_path / "replay")
    other = make_store(tmp_path / "other", sha="b")
    for arguments, message in [
        (dict(length=0), "length"),
        (dict(seed=-1), "seed"),
        (dict(replay=replay, replay_ratio=1.0), "ratio"),
        (dict(replay=replay), "give both"),
        (dict(replay_ratio=0.1), "give both"),
        (dict(replay=other, replay_ratio=0.1), "different tokenizers"),
    ]:
        with pytest.raises(InputError, match=message):
            TrainingWindows(store, **{"length": 8, "seed": 0, **arguments})
    with pytest.raises(InputError, match="nothing to predict"):
        TrainingWindows(make_store(tmp_path / "ones", lengths=[1, 1]), 8, seed=0)
    with pytest.raises(IndexError):
        TrainingWindows(store, 8, seed=0)[-1]
