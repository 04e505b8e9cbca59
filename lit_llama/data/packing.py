"""Token store -> training windows of one length, in an order that is a pure function of (arguments, index).

A document t0..tn gives n training pairs (input t_i, target t_{i+1}). The pairs of all documents, shuffled anew each
epoch, form one stream that is cut every `length` pairs. So each token that has a predecessor in its document is a
target exactly once an epoch, whatever its place: a document that a window's end cuts goes on in the next one, whose
first input is the last target. Moving windows to a device and learning from them is the training loop's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lit_llama.data.token_store import TokenStore
from lit_llama.errors import InputError

IGNORE_INDEX = -100
PADDING_DOCUMENT = -1


class Window(NamedTuple):
    """One training sequence; each field is a (length,) int64 array.

    `labels[i]` is the token to predict from `input_ids[i]` (already shifted), -100 where it does not count.
    `document_ids` number the segments of documents in the window from 0: a token attends to its own segment only, and
    `position_ids` restart at 0 with each. Padding, at the end of an epoch's last window, has document -1, label -100.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    document_ids: np.ndarray


class Batch(NamedTuple):
    """Windows stacked into (batch, length) int64 tensors; the fields mean what they mean in `Window`."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor


def collate(windows: Sequence[Window]) -> Batch:
    """Stack windows of one length."""
    return Batch(*(torch.from_numpy(np.stack(field)) for field in zip(*windows, strict=True)))


class TrainingWindows:
    """The endless sequence of windows over a token store, epoch after epoch; `windows[index]` for any index >= 0.

    A window depends on the arguments and its index only, so resuming needs no state and ranks need not talk to each
    other. Costs 16 bytes a document and 8 a window of memory; reading in order is fastest (one epoch's order is kept).

    Args:
        store: The domain's tokens.
        length: Pairs a window.
        seed: Of the order of documents and windows, and of the places of replay windows.
        replay: Tokens of other text to mix in against forgetting.
        replay_ratio: Share of all windows that come from `replay`, 0 <= ratio < 1. Each epoch holds the same number of
            them (at least one), and none comes twice before the replay store is through.
        shuffle: False keeps the order of the store in every epoch, replay windows last: for validation.

    Raises:
        InputError: a length below 1, a negative seed, a ratio outside [0, 1), one of `replay` and `replay_ratio`
            without the other, a replay store of another tokenizer, or a store without a training pair.
    """

    def __init__(
        self,
        store: TokenStore,
        length: int,
        seed: int,
        replay: TokenStore | None = None,
        replay_ratio: float = 0.0,
        shuffle: bool = True,
    ) -> None:
        if length < 1:
            raise InputError(f"windows of {length} tokens: the sequence length must be at least 1")
        if seed < 0:
            raise InputError(f"seed {seed}: must be 0 or more")
        if not 0 <= replay_ratio < 1:
            raise InputError(f"replay ratio {replay_ratio}: must be at least 0 and below 1 (0.1 = every tenth window)")
        if (replay is None) != (replay_ratio == 0):
            raise InputError(
                f"replay ratio {replay_ratio} {'without' if replay is None else 'with'} a replay store: give both"
            )
        if replay is not None and replay.meta["tokenizer"]["sha256"] != store.meta["tokenizer"]["sha256"]:
            raise InputError(
                f"{replay.data_dir} and {store.data_dir} were made by different tokenizers; prepare both with one"
            )
        self.store, self.length, self.seed, self.shuffle = store, length, seed, shuffle
        self._documents = np.flatnonzero(np.diff(store.offsets) > 1)
        if not len(self._documents):
            raise InputError(f"{store.data_dir}/{store.split}: no document of two tokens or more, nothing to predict")
        pairs = int((np.diff(store.offsets)[self._documents] - 1).sum())
        self.domain_windows = -(-pairs // length)
        self.replay_windows = 0
        if replay is not None:
            self.replay_windows = max(1, round(self.domain_windows * replay_ratio / (1 - replay_ratio)))
            self._replay = TrainingWindows(replay, length, seed, shuffle=shuffle)
        self.windows_per_epoch = self.domain_windows + self.replay_windows
        self._epoch: int | None = None

    def __getitem__(self, index: int) -> Window:
        """The window at `index` of the endless sequence; its epoch is `index // windows_per_epoch`."""
        epoch, slot = self._locate(index)
        number = int(self._order[slot])
        if number >= self.domain_windows:
            return self._replay[epoch * self.replay_windows + number - self.domain_windows]
        return self._cut(number)

    def is_replay(self, index: int) -> bool:
        """Whether the window at `index` comes from the replay store."""
        _, slot = self._locate(index)
        return bool(self._order[slot] >= self.domain_windows)

    def _locate(self, index: int) -> tuple[int, int]:
        if index < 0:
            raise IndexError(f"window {index}: the sequence starts at 0 and has no end")
        epoch, slot = divmod(index, self.windows_per_epoch)
        if epoch != self._epoch:
            self._arrange(epoch)
        return epoch, slot

    def _arrange(self, epoch: int) -> None:
        """Draw the epoch's order: which document follows which in the stream, and which window comes at which slot."""
        self._stream = self._documents
        self._order = np.arange(self.windows_per_epoch)
        if self.shuffle:
            random = np.random.default_rng([self.seed, epoch])
            self._stream = random.permutation(self._documents)
            random.shuffle(self._order)
            # Replay windows in the order of the replay's own sequence, so that it too is walked one epoch at a time.
            is_replay = self._order >= self.domain_windows
            self._order[is_replay] = np.arange(self.domain_windows, self.windows_per_epoch)
        lengths = self.store.offsets[self._stream + 1] - self.store.offsets[self._stream]
        self._ends = np.cumsum(lengths - 1)
        self._epoch = epoch

    def _cut(self, number: int) -> Window:
        """Window `number` of the current epoch's stream of pairs, before the windows are shuffled."""
        inputs, positions = np.zeros((2, self.length), dtype=np.int64)
        labels = np.full(self.length, IGNORE_INDEX, dtype=np.int64)
        documents = np.full(self.length, PADDING_DOCUMENT, dtype=np.int64)
        pair = number * self.length
        place = int(np.searchsorted(self._ends, pair, side="right"))
        filled = segment = 0
        while filled < self.length and place < len(self._stream):
            tokens, mask = self.store.document(int(self._stream[place]))
            first = pair - (int(self._ends[place]) - (len(tokens) - 1))
            count = min(self.length - filled, len(tokens) - 1 - first)
            part = slice(filled, filled + count)
            inputs[part] = tokens[first : first + count]
            labels[part] = tokens[first + 1 : first + count + 1]
            if mask is not None:
                labels[part][mask[first + 1 : first + count + 1] == 0] = IGNORE_INDEX
            positions[part] = np.arange(count)
            documents[part] = segment
            filled, pair, place, segment = filled + count, pair + count, place + 1, segment + 1
        return Window(inputs, labels, positions, documents)
