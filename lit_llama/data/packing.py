"""Token store -> training windows of one length, in an order that is a pure function of (arguments, index).

A document t0..tn gives n training pairs (input t_i, target t_{i+1}). The pairs of all documents, shuffled anew each
epoch, form one stream that is cut every `length` pairs. So each token that has a predecessor in its document is a
target exactly once an epoch, whatever its place: a document that a window's end cuts goes on in the next one, whose
first input is the last target. Documents that are views of one source (the store's groups) never meet in a window:
facts that are read in several wordings can be asked for later (Allen-Zhu & Li, Physics of Language Models 3.1, arXiv
2309.14316), unless the wordings lie side by side (7 % answered instead of 97 %: github.com/ykrmm/PhysicsLLM_3.1).
Moving windows to a device and learning from them is the training loop's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lit_llama.data.token_store import NO_GROUP, TokenStore
from lit_llama.errors import InputError

ARRANGEMENTS = 20
"""How often to try another order of an epoch whose windows would hold two views of one source."""
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
    """Windows stacked into (batch, length) int64 tensors; the fields mean what they mean in `Window`.

    `targets` (n,) int64 are the positions in the flattened batch that have a label: known here, so that a GPU need not
    be asked how many there are.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    targets: torch.Tensor


def collate(windows: Sequence[Window]) -> Batch:
    """Stack windows of one length."""
    fields = [torch.from_numpy(np.stack(field)) for field in zip(*windows, strict=True)]
    labels = fields[1].flatten()
    return Batch(*fields, targets=(labels != IGNORE_INDEX).nonzero().squeeze(1))


def without_targets(window: Window) -> Window:
    """The window with nothing to learn in it, to fill a batch or to keep a process busy that has none left."""
    return window._replace(labels=np.full_like(window.labels, IGNORE_INDEX))


class TrainingWindows:
    """The endless sequence of windows over a token store, epoch after epoch; `windows[index]` for any index >= 0.

    A window depends on the arguments and its index only, so resuming needs no state and ranks need not talk to each
    other. Costs 16 bytes a document (24 where the store has groups) and 8 a window of memory; reading in order is
    fastest (one epoch's order is kept).

    Args:
        store: The domain's tokens. No window holds two documents, or parts of them, of one of its groups.
        length: Pairs a window.
        seed: Of the order of documents and windows, and of the places of replay windows.
        replay: Tokens of other text to mix in against forgetting.
        replay_ratio: Share of all windows that come from `replay`, 0 <= ratio < 1. Each epoch holds the same number of
            them (at least one), and none comes twice before the replay store is through.
        shuffle: False keeps the order of the store in every epoch, groups or not, replay windows last: for validation.

    Raises:
        InputError: a length below 1, a negative seed, a ratio outside [0, 1), one of `replay` and `replay_ratio`
            without the other, a replay store of another tokenizer, a store without a training pair, or too small a one
            to keep the views of its sources out of each other's windows (this may also come with a later epoch).
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
        self._groups = None
        if store.groups is not None and shuffle:
            groups = store.groups[self._documents]
            alone = groups == NO_GROUP
            _, groups = np.unique(np.where(alone, -1 - np.arange(len(groups)), groups), return_inverse=True)
            self._groups = groups if groups.max() + 1 < len(groups) else None
        pairs = int((np.diff(store.offsets)[self._documents] - 1).sum())
        self.domain_windows = -(-pairs // length)
        self.replay_windows = 0
        if replay is not None:
            self.replay_windows = max(1, round(self.domain_windows * replay_ratio / (1 - replay_ratio)))
            self._replay = TrainingWindows(replay, length, seed, shuffle=shuffle)
        self.windows_per_epoch = self.domain_windows + self.replay_windows
        self._epoch: int | None = None
        if self._groups is not None:
            self._arrange(0)  # an error shall come at once

    @property
    def name(self) -> str:
        """Where the windows come from, for messages."""
        return f"{self.store.data_dir}/{self.store.split}"

    @property
    def bytes_per_target(self) -> float | None:
        """UTF-8 bytes of the store's text a target token; None where some tokens are masked, or no text is known."""
        if self.store.loss_mask is not None or not self.store.num_bytes:
            return None
        return self.store.num_bytes / int((np.diff(self.store.offsets)[self._documents] - 1).sum())

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
            if self._groups is None:
                self._stream = random.permutation(self._documents)
            else:
                self._stream = self._documents[self._spread(random)]
            random.shuffle(self._order)
            # Replay windows in the order of the replay's own sequence, so that it too is walked one epoch at a time.
            is_replay = self._order >= self.domain_windows
            self._order[is_replay] = np.arange(self.domain_windows, self.windows_per_epoch)
        lengths = self.store.offsets[self._stream + 1] - self.store.offsets[self._stream]
        self._ends = np.cumsum(lengths - 1)
        self._epoch = epoch

    def _spread(self, random: np.random.Generator) -> np.ndarray:
        """An order of the documents, as indices into `_documents`, in which no window holds two views of a source.

        The k views of a source come at the phases (u + i) / k of the epoch, i = 0..k-1, with 0 <= u < 1: as far apart
        as can be. The u of sources with equally many views are random but spread evenly, because the distance of two
        views in tokens then varies least.
        """
        sizes = np.bincount(self._groups)
        for _ in range(ARRANGEMENTS):
            sources = np.lexsort((random.permutation(len(sizes)), sizes))
            starts = np.empty(len(sizes))
            starts[sources] = _places(sizes[sources]) + random.random(len(sizes))
            starts /= np.bincount(sizes)[sizes]
            views = np.lexsort((random.permutation(len(self._groups)), self._groups))
            groups = self._groups[views]
            order = views[np.argsort((starts[groups] + _places(groups)) / sizes[groups], kind="stable")]
            if not self._views_meet(order):
                return order
        raise InputError(
            f"{self.store.data_dir}/{self.store.split} is too small for windows of {self.length} tokens: some would"
            f" hold two views of one source (up to {sizes.max()} views of {len(sizes)} sources); shorten the windows"
            " (--train.sequence_length) or add sources"
        )

    def _views_meet(self, order: np.ndarray) -> bool:
        """Whether some window of a stream in this order holds two views of a source."""
        lengths = np.diff(self.store.offsets)[self._documents][order] - 1
        ends = np.cumsum(lengths)
        first_windows, last_windows = (ends - lengths) // self.length, (ends - 1) // self.length
        by_group = np.argsort(self._groups[order], kind="stable")
        groups = self._groups[order][by_group]
        meeting = first_windows[by_group][1:] <= last_windows[by_group][:-1]
        return bool((meeting & (groups[1:] == groups[:-1])).any())

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


def _places(values: np.ndarray) -> np.ndarray:
    """How many equal ones come before each of the sorted `values`."""
    return np.arange(len(values)) - np.searchsorted(values, values)
