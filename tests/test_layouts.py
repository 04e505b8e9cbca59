"""Examples in windows, against a plain-Python account of what each epoch must hold, and against one at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_packing import epoch_of, make_store, pairs_in, pairs_of, same

from lit_llama.checkpoint import load_model
from lit_llama.data.layouts import best_fit
from lit_llama.data.packing import TrainingWindows, collate
from lit_llama.data.token_store import TokenStore, TokenStoreWriter
from lit_llama.errors import InputError
from lit_llama.loss import head_loss

LENGTHS = (9, 17, 2, 40, 3, 33, 5, 2, 21, 21, 21, 9, 14, 28, 1, 40)


def examples(data_dir: Path, lengths=LENGTHS, **options) -> TokenStore:
    store = make_store(data_dir, lengths, **options)
    store.meta["examples"] = True
    return store


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("mask", [False, True])
def test_every_epoch_holds_every_example_whole(tmp_path: Path, layout: str, mask: bool) -> None:
    store = examples(tmp_path / "s", mask=mask)
    windows = TrainingWindows(store, 40, seed=3, examples=layout, batch_size=4)
    orders = []
    for epoch in range(3):
        held = epoch_of(windows, epoch)
        assert pairs_in(held) == pairs_of(store)
        for window in held:
            for document in set(window.document_ids[window.document_ids >= 0].tolist()):
                inputs = window.input_ids[window.document_ids == document]
                index = int(np.searchsorted(store.offsets, inputs[0], side="right")) - 1
                assert inputs.tolist() == store.document(index)[0][:-1].tolist()
                positions = window.position_ids[window.document_ids == document]
                assert positions.tolist() == list(range(len(inputs)))
        orders.append([window.input_ids.tolist() for window in held])
    assert orders[0] != orders[1] != orders[2]
    again = TrainingWindows(store, 40, seed=3, examples=layout, batch_size=4)
    assert all(same(again[i], windows[i]) for i in range(2 * windows.windows_per_epoch))


def test_packing_is_close_to_the_fewest_windows_and_never_overfull() -> None:
    random = np.random.default_rng(0)
    for capacity in (7, 64, 512):
        lengths = random.integers(1, capacity + 1, 3000)
        bins = best_fit(lengths, capacity)
        assert sorted(i for b in bins for i in b) == list(range(3000))
        assert max(lengths[b].sum() for b in bins) <= capacity
        # 11/9 of the optimum, which is at least the sum over the capacity and the number of more than half.
        assert len(bins) <= 11 / 9 * max(-(-lengths.sum() // capacity), (2 * lengths > capacity).sum()) + 1


def test_views_of_a_source_are_packed_apart(tmp_path: Path) -> None:
    groups = [0, 0, 0, 1, 1, 2, 2, 2, None, None, 3, 3, 0, 1, None, 2]
    store = examples(tmp_path / "s", groups=groups)
    windows = TrainingWindows(store, 60, seed=0)
    met = 0
    for epoch in range(2):
        for window in epoch_of(windows, epoch):
            inputs = [window.input_ids[window.document_ids == d][0] for d in range(window.document_ids.max() + 1)]
            held = [groups[int(np.searchsorted(store.offsets, first, side="right")) - 1] for first in inputs]
            known = [group for group in held if group is not None]
            assert len(known) == len(set(known))
            met += len(held) > 1
    assert met > 4
    assert pairs_in(epoch_of(windows, 0)) == pairs_of(store)


def test_padded_batches_are_of_about_one_length(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    store = examples(tmp_path / "s", tuple(random.integers(2, 200, 800).tolist()))
    windows = TrainingWindows(store, 256, seed=0, examples="padded", batch_size=8)
    padding, tokens = 0, 0
    for start in range(0, 800, 8):
        batch = collate([windows[i] for i in range(start, start + 8)])
        padding += int((batch.document_ids == -1).sum())
        tokens += batch.document_ids.numel()
    assert padding / tokens < 0.12  # half of it would be padding if lengths were mixed


def test_an_example_longer_than_a_window_is_refused(tmp_path: Path) -> None:
    store = examples(tmp_path / "s")
    for layout in ("packed", "padded"):
        with pytest.raises(InputError, match=r"2 of 15 examples are longer than 38 tokens \(the longest has 39\)"):
            TrainingWindows(store, 38, seed=0, examples=layout)


def test_replay_is_mixed_into_examples(tmp_path: Path) -> None:
    store, replay = examples(tmp_path / "s"), make_store(tmp_path / "r", (400,), first=50_000)
    for layout in ("packed", "padded"):
        windows = TrainingWindows(store, 40, 0, replay=replay, replay_ratio=0.25, examples=layout, batch_size=4)
        held = epoch_of(windows, 0)
        replayed = [window for i, window in enumerate(held) if windows.is_replay(i)]
        assert len(replayed) == windows.replay_windows == round(windows.domain_windows / 3)
        assert all(window.input_ids[0] >= 50_000 for window in replayed)
        assert pairs_in([window for i, window in enumerate(held) if not windows.is_replay(i)]) == pairs_of(store)


def test_packed_padded_and_single_examples_have_one_loss_and_gradient(tiny_checkpoint: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with TokenStoreWriter(tmp_path / "s", 320, "a" * 64, "test", extra={"examples": True}) as writer:
        for length in (9, 17, 3, 33, 5, 21, 40):
            mask = np.arange(length) > length // 2
            writer.add("train", random.integers(3, 320, length), mask)
    store = TokenStore.open(tmp_path / "s", "train")
    model = load_model(tiny_checkpoint, torch.float32)
    model.requires_grad_(True)

    def loss_and_gradients(windows: list) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        input_ids, labels, position_ids, document_ids, targets, *_ = collate(windows)
        hidden = model.model(input_ids, position_ids, document_ids)
        loss = head_loss(model.lm_head, hidden, labels, reduction="sum", targets=targets)
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    alone = TrainingWindows(store, 64, seed=0, shuffle=False, examples="padded")
    expected, gradients = 0.0, {}
    for i in range(alone.windows_per_epoch):
        loss, own = loss_and_gradients([alone[i]])
        expected += loss
        gradients = {name: own[name] + gradients.get(name, 0) for name in own}
    packed = TrainingWindows(store, 64, seed=0)
    assert packed.windows_per_epoch == 2
    for together in (epoch_of(packed, 0), epoch_of(alone, 0)):
        loss, own = loss_and_gradients(together)
        assert loss == pytest.approx(expected, rel=1e-6)
        for name, gradient in gradients.items():
            assert (own[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
