"""How an epoch's documents become windows: cut where a window is full, or whole examples packed or padded.

A document t0..tn gives n training pairs (input t_i, target t_{i+1}). Each layout lays the pairs of all documents into
windows and knows nothing of epochs, replay or batches, which are `packing.TrainingWindows`'s:

- `CutDocuments`, for text: the pairs of all documents, in a new order each epoch, form one stream that is cut every
  `length` pairs. Each token that has a predecessor in its document is a target exactly once an epoch, whatever its
  place; a document that a window's end cuts goes on in the next one, whose first input is the last target.
- `PackedExamples`: examples (an answer with its prompt) are never cut; several fill a window.
- `PaddedExamples`: one example a window, as long as itself; those of a batch have about the same length.

Documents that are views of one source (the store's groups) never meet in a window: facts that are read in several
wordings can be asked for later (Allen-Zhu & Li, Physics of Language Models 3.1, arXiv 2309.14316), unless the wordings
lie side by side (7 % answered instead of 97 %: github.com/ykrmm/PhysicsLLM_3.1).
"""

from typing import NamedTuple

import numpy as np

from lit_llama.data.token_store import NO_GROUP, TokenStore
from lit_llama.errors import InputError

ARRANGEMENTS = 20
"""How often to try another order of an epoch whose windows would hold two views of one source."""
BATCHES_SORTED_TOGETHER = 50
"""Of padded examples: more means less padding, fewer means batches that are more mixed."""
IGNORE_INDEX = -100
PADDING_DOCUMENT = -1


class Window(NamedTuple):
    """One training sequence; each field is a (length,) int64 array.

    `labels[i]` is the token to predict from `input_ids[i]` (already shifted), -100 where it does not count.
    `document_ids` number the segments of documents in the window from 0: a token attends to its own segment only, and
    `position_ids` restart at 0 with each. Padding, at a window's end, has document -1 and label -100.
    `teacher` are ids (length, k) and probabilities (length, k) of what may follow each token, instead of its label;
    probabilities of 0 where the label counts.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    document_ids: np.ndarray
    teacher: tuple[np.ndarray, np.ndarray] | None = None


PADDING = (0, IGNORE_INDEX, 0, PADDING_DOCUMENT)
"""What fills each of the first four fields of a window behind its last document."""


class CutDocuments:
    """All documents as one stream of pairs, cut every `length`.

    Args:
        store: no window holds two documents, or parts of them, of one of its groups.
        documents: (n,) int64, those of the store with a pair.
        shuffle: whether `arrange` will be given random numbers; without, groups are left where they are.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, length: int, shuffle: bool) -> None:
        self.store, self.length, self._documents = store, length, documents
        self._groups = _numbered_groups(store, documents) if shuffle else None
        self.num_windows = -(-int((np.diff(store.offsets)[documents] - 1).sum()) // length)

    def arrange(self, random: np.random.Generator | None) -> None:
        """Draw which document follows which in the stream; None keeps the order of the store."""
        self._stream = self._documents
        if random is not None:
            order = random.permutation(len(self._documents)) if self._groups is None else self._spread(random)
            self._stream = self._documents[order]
        lengths = self.store.offsets[self._stream + 1] - self.store.offsets[self._stream]
        self._ends = np.cumsum(lengths - 1)

    def order(self, random: np.random.Generator) -> np.ndarray | None:
        """In which order the windows shall come; None: any."""
        return None

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

    def window(self, number: int) -> Window:
        """Window `number` of the arrangement, padded at the end of the stream."""
        window = _empty(self.length, self.store)
        pair = number * self.length
        place = int(np.searchsorted(self._ends, pair, side="right"))
        filled = segment = 0
        while filled < self.length and place < len(self._stream):
            tokens, mask = self.store.document(int(self._stream[place]))
            first = pair - (int(self._ends[place]) - (len(tokens) - 1))
            count = min(self.length - filled, len(tokens) - 1 - first)
            _lay(window, filled, tokens, mask, first, count, segment)
            filled, pair, place, segment = filled + count, pair + count, place + 1, segment + 1
        return window


class PackedExamples:
    """Whole examples, as many as fit into each window; which ones lie together changes from epoch to epoch.

    Windows are filled by best-fit decreasing, once; an epoch then deals the examples of equal length anew to the places
    of that length, so that every epoch has the same number of windows. Where the store has groups the places are
    fixed.

    Args:
        store: of examples.
        documents: (n,) int64, those of the store with a pair.

    Raises:
        InputError: an example that is longer than a window.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, length: int) -> None:
        self.store, self.length, self._documents = store, length, documents
        self._lengths = _example_lengths(store, documents, length)
        self._groups = _numbered_groups(store, documents)
        windows = best_fit(self._lengths, length, self._groups)
        self.num_windows = len(windows)
        self._ends = np.cumsum([len(window) for window in windows])
        self._places = np.concatenate(windows)  # index of the example at each place
        self._by_length = np.argsort(self._lengths[self._places], kind="stable")
        self._examples = self._places

    def arrange(self, random: np.random.Generator | None) -> None:
        """Deal the examples to the places; None keeps the first arrangement."""
        self._examples = self._places
        if random is not None and self._groups is None:
            self._examples = np.empty_like(self._places)
            self._examples[self._by_length] = np.lexsort((random.random(len(self._lengths)), self._lengths))

    def order(self, random: np.random.Generator) -> np.ndarray | None:
        """In which order the windows shall come; None: any."""
        return None

    def window(self, number: int) -> Window:
        """Window `number` of the arrangement, padded to `length`."""
        window, filled = _empty(self.length, self.store), 0
        first = int(self._ends[number - 1]) if number else 0
        for segment, example in enumerate(self._examples[first : int(self._ends[number])]):
            filled += _lay_example(window, filled, self.store, int(self._documents[example]), segment)
        return window


class PaddedExamples:
    """One whole example a window, of its own length; examples of about one length come in the same batch.

    Args:
        store: of examples.
        documents: (n,) int64, those of the store with a pair.
        batch_size: windows that should have about the same length.

    Raises:
        InputError: an example of more than `length` pairs.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, length: int, batch_size: int) -> None:
        self.store, self._documents, self._batch_size = store, documents, batch_size
        self._lengths = _example_lengths(store, documents, length)
        self.num_windows = len(documents)

    def arrange(self, random: np.random.Generator | None) -> None:
        """Nothing to draw but the order."""

    def order(self, random: np.random.Generator) -> np.ndarray | None:
        """Batches in random order, each of examples of about one length; what fills no batch comes last."""
        order = random.permutation(self.num_windows)
        together = BATCHES_SORTED_TOGETHER * self._batch_size
        for start in range(0, len(order), together):
            part = order[start : start + together]
            order[start : start + together] = part[np.argsort(self._lengths[part], kind="stable")]
        full = len(order) - len(order) % self._batch_size
        order[:full] = random.permutation(order[:full].reshape(-1, self._batch_size)).flatten()
        return order

    def window(self, number: int) -> Window:
        """Example `number`."""
        document = int(self._documents[number])
        window = _empty(int(self._lengths[number]), self.store)
        _lay_example(window, 0, self.store, document, 0)
        return window


def best_fit(lengths: np.ndarray, capacity: int, groups: np.ndarray | None = None) -> list[list[int]]:
    """Bins of at most `capacity`, by best-fit decreasing (Johnson 1974: at most 11/9 of the fewest possible).

    Args:
        lengths: (n,) of what is to be packed, each from 1 to `capacity`.
        groups: (n,) numbers; no two of one number in a bin.

    Returns:
        Indices into `lengths`, a list for each bin.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where a bin has exactly that much room
    for index in np.argsort(-lengths, kind="stable").tolist():
        needed = int(lengths[index])
        larger, chosen, room = rooms >> needed, None, capacity
        while larger and chosen is None:
            room = needed + (larger & -larger).bit_length() - 1
            larger &= larger - 1
            chosen = next((b for b in with_room[room] if groups is None or not _holds(bins[b], groups, index)), None)
        if chosen is None:
            chosen, room = len(bins), capacity
            bins.append([])
        else:
            with_room[room].remove(chosen)
            if not with_room[room]:
                rooms ^= 1 << room
        bins[chosen].append(index)
        with_room[room - needed].append(chosen)
        rooms |= 1 << (room - needed)
    return bins


def _holds(members: list[int], groups: np.ndarray, index: int) -> bool:
    return any(groups[member] == groups[index] for member in members)


def _example_lengths(store: TokenStore, documents: np.ndarray, length: int) -> np.ndarray:
    """Pairs of each example."""
    lengths = np.diff(store.offsets)[documents] - 1
    if (too_long := int((lengths > length).sum())) > 0:
        raise InputError(
            f"{store.data_dir}/{store.split}: {too_long} of {len(lengths)} examples are longer than {length} tokens"
            f" (the longest has {lengths.max()}): raise the sequence length, or prepare with a lower --max_length"
        )
    return lengths


def _numbered_groups(store: TokenStore, documents: np.ndarray) -> np.ndarray | None:
    """The group of each document, from 0, each alone in one where the store says none; None where all are alone."""
    if store.groups is None:
        return None
    groups = store.groups[documents]
    alone = groups == NO_GROUP
    _, groups = np.unique(np.where(alone, -1 - np.arange(len(groups)), groups), return_inverse=True)
    return groups if groups.max() + 1 < len(groups) else None


def _empty(length: int, store: TokenStore) -> Window:
    window = Window(*(np.full(length, fill, dtype=np.int64) for fill in PADDING))
    if store.teacher is None:
        return window
    shape = (length, store.teacher[0].shape[1])
    return window._replace(teacher=(np.zeros(shape, np.int64), np.zeros(shape, np.float32)))


def _lay_example(window: Window, place: int, store: TokenStore, document: int, segment: int) -> int:
    """Write a whole document into the window at `place`; returns its number of pairs."""
    tokens, mask = store.document(document)
    count = len(tokens) - 1
    _lay(window, place, tokens, mask, 0, count, segment)
    if window.teacher is not None:
        for into, values in zip(window.teacher, store.teacher_of(document), strict=True):
            into[place : place + count] = values[1:]
    return count


def _lay(
    window: Window, place: int, tokens: np.ndarray, mask: np.ndarray | None, first: int, count: int, segment: int
) -> None:
    """Write `count` pairs of a document, from its pair `first` on, into the window at `place`."""
    part = slice(place, place + count)
    window.input_ids[part] = tokens[first : first + count]
    window.labels[part] = tokens[first + 1 : first + count + 1]
    if mask is not None:
        window.labels[part][mask[first + 1 : first + count + 1] == 0] = IGNORE_INDEX
    window.position_ids[part] = np.arange(count)
    window.document_ids[part] = segment


def _places(values: np.ndarray) -> np.ndarray:
    """How many equal ones come before each of the sorted `values`."""
    return np.arange(len(values)) - np.searchsorted(values, values)
