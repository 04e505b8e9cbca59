"""Token store -> training windows, in an order that is a pure function of (arguments, index), and windows -> batches.

How documents lie in windows is `layouts`'s. Moving batches to a device and learning from them is the training loop's.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from lit_llama.data.layouts import IGNORE_INDEX, PADDING, CutDocuments, PackedExamples, PaddedExamples, Window
from lit_llama.data.token_store import TokenStore
from lit_llama.errors import InputError

PADDED_TO = 16
"""Batches of every length there is would leave freed memory in pieces of every size, which none of the next fits."""


class Batch(NamedTuple):
    """Windows stacked into (batch, length) int64 tensors; the fields mean what they mean in `Window`.

    `targets` (n,) int64 are the positions in the flattened batch that have a label: known here, so that a GPU need not
    be asked how many there are. `teacher_ids` (n, k) int64 and `teacher_probabilities` (n, k) fp32 say what a teacher
    expects at each target, a label being a probability of 1; k is 0 where no window has a teacher.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    targets: torch.Tensor
    teacher_ids: torch.Tensor
    teacher_probabilities: torch.Tensor


def collate(windows: Sequence[Window]) -> Batch:
    """Stack windows; those of several lengths are padded to the longest, rounded up to a multiple of `PADDED_TO`."""
    lengths = {len(window.input_ids) for window in windows}
    length = max(lengths)
    if len(lengths) > 1:
        length = -(-length // PADDED_TO) * PADDED_TO
    fields = []
    for rows, fill in zip(zip(*windows, strict=True), PADDING, strict=False):
        padded = [np.pad(row, (0, length - len(row)), constant_values=fill) for row in rows]
        fields.append(torch.from_numpy(np.stack(padded)))
    labels = fields[1].flatten()
    targets = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    return Batch(*fields, targets, *_teacher_of_targets(windows, length, labels, targets))


def _teacher_of_targets(
    windows: Sequence[Window], length: int, labels: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (n, k) and probabilities (n, k) at the targets of windows of which some have a teacher."""
    top_k = max((window.teacher[0].shape[1] for window in windows if window.teacher is not None), default=0)
    if not top_k:
        return torch.zeros(len(targets), 0, dtype=torch.int64), torch.zeros(len(targets), 0)
    ids = torch.zeros(len(windows), length, top_k, dtype=torch.int64)
    probabilities = torch.zeros(len(windows), length, top_k)
    for row, window in enumerate(windows):
        if window.teacher is not None:
            for into, values in zip((ids, probabilities), window.teacher, strict=True):
                into[row, : values.shape[0], : values.shape[1]] = torch.from_numpy(values)
    ids, probabilities = ids.flatten(0, 1)[targets], probabilities.flatten(0, 1)[targets]
    without = probabilities.sum(1) == 0
    ids[without, 0], probabilities[without, 0] = labels[targets][without], 1.0
    return ids, probabilities


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
        length: Pairs a window; where examples are padded, the most that one may have.
        seed: Of the order of documents and windows, and of the places of replay windows.
        replay: Tokens of other text to mix in against forgetting.
        replay_ratio: Share of all windows that come from `replay`, 0 <= ratio < 1. Each epoch holds the same number of
            them (at least one), and none comes twice before the replay store is through.
        shuffle: False keeps one order in every epoch, replay windows last: for validation.
        examples: How the documents of a store of examples (`"examples": true` in its meta.json) lie in windows: several
            whole ones in each, or each alone and padded to the others of a batch. Other stores are cut.
        batch_size: Windows that a step takes, which padded examples are sorted for.

    Raises:
        InputError: a length below 1, a negative seed, a ratio outside [0, 1), one of `replay` and `replay_ratio`
            without the other, a replay store of another tokenizer, a store without a training pair, an example longer
            than a window, or too small a store to keep the views of its sources out of each other's windows (this may
            also come with a later epoch).
    """

    def __init__(
        self,
        store: TokenStore,
        length: int,
        seed: int,
        replay: TokenStore | None = None,
        replay_ratio: float = 0.0,
        shuffle: bool = True,
        examples: Literal["packed", "padded"] = "packed",
        batch_size: int = 1,
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
        documents = np.flatnonzero(np.diff(store.offsets) > 1)
        if not len(documents):
            raise InputError(f"{store.data_dir}/{store.split}: no document of two tokens or more, nothing to predict")
        self._layout: CutDocuments | PackedExamples | PaddedExamples
        if not store.meta.get("examples"):
            self._layout = CutDocuments(store, documents, length, shuffle)
        elif examples == "packed":
            self._layout = PackedExamples(store, documents, length)
        else:
            self._layout = PaddedExamples(store, documents, length, batch_size)
        self._targets = int((np.diff(store.offsets)[documents] - 1).sum())
        self.domain_windows = self._layout.num_windows
        self.replay_windows = 0
        if replay is not None:
            self.replay_windows = max(1, round(self.domain_windows * replay_ratio / (1 - replay_ratio)))
            self._replay = TrainingWindows(replay, length, seed, shuffle=shuffle)
        self.windows_per_epoch = self.domain_windows + self.replay_windows
        self._epoch: int | None = None
        if shuffle and store.groups is not None:
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
        return self.store.num_bytes / self._targets

    @property
    def tokens_per_window(self) -> float:
        """Training pairs of a window of the store, padding not counted, on average."""
        return self._targets / self.domain_windows

    def __getitem__(self, index: int) -> Window:
        """The window at `index` of the endless sequence; its epoch is `index // windows_per_epoch`."""
        epoch, slot = self._locate(index)
        number = int(self._order[slot])
        if number >= self.domain_windows:
            return self._replay[epoch * self.replay_windows + number - self.domain_windows]
        return self._layout.window(number)

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
        """Draw the epoch's order: how the documents lie in windows, and which window comes at which slot."""
        self._order = np.arange(self.windows_per_epoch)
        random = np.random.default_rng([self.seed, epoch]) if self.shuffle else None
        self._layout.arrange(random)
        if random is not None:
            random.shuffle(self._order)
            # Replay windows in the order of the replay's own sequence, so that it too is walked one epoch at a time.
            is_replay = self._order >= self.domain_windows
            self._order[is_replay] = np.arange(self.domain_windows, self.windows_per_epoch)
            if (order := self._layout.order(random)) is not None:
                self._order[~is_replay] = order
        self._epoch = epoch
