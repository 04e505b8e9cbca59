"""Training windows in chunks on a local disk, a shared one or an object storage, read by litdata as they are needed.

A stream is made from a token store for one window length (`scripts/stream_corpus.py`) and holds

    meta/     one record: the tokenizer, the length, the counts of each split
    train/    the windows, cut as `packing.TrainingWindows` cuts them, in chunks of as many windows each
    val/      the same of the held-out documents

A machine that trains keeps only some chunks at a time. It asks for windows by index as it asks a token store, so that
a resumed run, or one of another number of processes, sees the same ones. litdata fetches chunks, keeps them in its
cache and drops them; what is in a window, and in which order windows come, is decided here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lit_llama.data.layouts import IGNORE_INDEX, PADDING_DOCUMENT, Window
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore, check_origin, token_dtype
from lit_llama.errors import InputError
from lit_llama.files import atomic_directory

FORMAT_VERSION = 1
CHUNKS_AT_ONCE = 4
"""Chunks in memory, whose windows are shuffled among each other."""


def is_stream(place: Path | str) -> bool:
    """Whether a `--data_dir` is a stream (a URL, or a directory that holds one) and not a token store."""
    return "://" in str(place) or str(place).startswith("local:") or (Path(place) / "meta/index.json").is_file()


def write_stream(
    store_dir: Path, stream_dir: Path, length: int, seed: int | None, chunk_bytes: int, overwrite: bool
) -> dict[str, dict[str, Any]]:
    """Cut the splits of a token store into windows and write them as a stream; complete or not at all.

    Args:
        length: pairs a window; training must use the same `train.sequence_length`.
        seed: of the order of the training split, `TrainingWindows`' first epoch; None keeps the order of the store.
        chunk_bytes: about the size of a chunk.

    Returns:
        The counts of each split, as in the record.

    Raises:
        InputError: no token store there, something at `stream_dir` already, or litdata missing.
    """
    litdata = _litdata()
    splits = [split for split in ("train", "val") if (Path(store_dir) / split).is_dir()]
    record: dict[str, Any] = {"format_version": FORMAT_VERSION, "length": length, "seed": seed, "splits": {}}
    with atomic_directory(stream_dir, overwrite) as directory:
        for split in splits:
            store = TokenStore.open(store_dir, split)
            if store.teacher is not None:
                raise InputError(f"{store_dir} has a teacher's probabilities, which a stream does not hold")
            shuffle = seed is not None and split == "train"
            windows = TrainingWindows(store, length, seed or 0, shuffle=shuffle)
            dtype = token_dtype(store.vocab_size)
            chunk_windows = max(1, chunk_bytes // (length * (dtype.itemsize + (store.loss_mask is not None))))
            cache = litdata.Cache(str(directory / split), chunk_size=chunk_windows)
            for index in range(windows.windows_per_epoch):
                cache[index] = encode_window(windows[index], dtype)
            cache.done()
            cache.merge()
            record["splits"][split] = {
                "windows": windows.windows_per_epoch,
                "chunk_windows": chunk_windows,
                "bytes_per_target": windows.bytes_per_target,
            }
            record |= {"tokenizer": store.meta["tokenizer"], "vocab_size": store.vocab_size}
        cache = litdata.Cache(str(directory / "meta"), chunk_size=1)
        cache[0] = json.dumps(record).encode()
        cache.done()
        cache.merge()
    return record["splits"]


@dataclass
class _Epoch:
    """Which chunks of an epoch are shuffled among each other, and where each group of them ends."""

    number: int
    groups: list[np.ndarray]
    ends: np.ndarray


class StreamedWindows:
    """The endless sequence of a stream's windows; `windows[index]` for any index >= 0, as in `TrainingWindows`.

    A window depends on the arguments and its index only. Each epoch takes the chunks in another order, a few at a time,
    and shuffles the windows of those; every process reads all chunks, and has the windows of a few in memory.

    Args:
        place: directory or URL of the stream, whatever litdata takes (s3://, gs://, ...).
        length: as the stream was written for.
        tokenizer_sha256: `Tokenizer.sha256` of the model's tokenizer.
        seed: of the order.
        replay: tokens of other text to mix in against forgetting, at even distances.
        replay_ratio: share of all windows that come from `replay`, 0 <= ratio < 1.
        shuffle: False keeps the order of the stream: for validation.

    Raises:
        InputError: a ratio outside [0, 1), no stream there, or one of another length or tokenizer, or litdata missing.
    """

    def __init__(
        self,
        place: str,
        split: str,
        length: int,
        tokenizer_sha256: str,
        seed: int,
        replay: TokenStore | None = None,
        replay_ratio: float = 0.0,
        shuffle: bool = True,
    ) -> None:
        if not 0 <= replay_ratio < 1:
            raise InputError(f"replay ratio {replay_ratio}: must be at least 0 and below 1 (0.1 = every tenth window)")
        record = _read_record(place)
        check_origin(place, record, split, tokenizer_sha256)
        if record["length"] != length:
            raise InputError(
                f"{place} holds windows of {record['length']} tokens: pass --train.sequence_length {record['length']},"
                f" or write a stream of {length} by scripts/stream_corpus.py"
            )
        counts = record["splits"][split]
        self.name = f"{place}/{split}"
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.domain_windows: int = counts["windows"]
        self.bytes_per_target: float | None = counts["bytes_per_target"]
        self.replay_windows = 0
        if replay is not None:
            self.replay_windows = max(1, round(self.domain_windows * replay_ratio / (1 - replay_ratio)))
            self._replay = TrainingWindows(replay, length, seed)
        self.windows_per_epoch = self.domain_windows + self.replay_windows
        self._chunk_windows: int = counts["chunk_windows"]
        self._dtype = token_dtype(record["vocab_size"])
        self._items = _dataset(self.name)
        self._epoch: _Epoch | None = None
        self._group: tuple[int, int] | None = None
        """Epoch and number of the group in memory, `_windows`."""
        self._windows: list[bytes] = []

    def __getitem__(self, index: int) -> Window:
        """The window at `index` of the endless sequence; its epoch is `index // windows_per_epoch`."""
        if index < 0:
            raise IndexError(f"window {index}: the sequence starts at 0 and has no end")
        epoch, slot = divmod(index, self.windows_per_epoch)
        replayed = slot * self.replay_windows // self.windows_per_epoch  # of the slots before
        if (slot + 1) * self.replay_windows // self.windows_per_epoch > replayed:
            return self._replay[epoch * self.replay_windows + replayed]
        number = slot - replayed
        item = self._shuffled(epoch, number) if self.shuffle else self._items[number]
        return decode_window(item, self.length, self._dtype)

    def _shuffled(self, epoch: int, number: int) -> bytes:
        if self._epoch is None or self._epoch.number != epoch:
            self._epoch = self._arrange(epoch)
        group = int(np.searchsorted(self._epoch.ends, number, side="right"))
        if self._group != (epoch, group):
            self._windows = []  # before the next ones come
            self._windows = [bytes(self._items[i]) for chunk in self._epoch.groups[group] for i in self._indices(chunk)]
            random = np.random.default_rng([self.seed, epoch, group])
            random.shuffle(self._windows)
            self._group = (epoch, group)
        return self._windows[number - int(self._epoch.ends[group])]  # from the group's end backwards

    def _arrange(self, epoch: int) -> _Epoch:
        chunks = np.arange(-(-self.domain_windows // self._chunk_windows))
        chunks = np.random.default_rng([self.seed, epoch]).permutation(chunks)
        groups = [chunks[start : start + CHUNKS_AT_ONCE] for start in range(0, len(chunks), CHUNKS_AT_ONCE)]
        sizes = [sum(len(self._indices(chunk)) for chunk in group) for group in groups]
        return _Epoch(epoch, groups, np.cumsum(sizes))

    def _indices(self, chunk: int) -> range:
        first = int(chunk) * self._chunk_windows
        return range(first, min(first + self._chunk_windows, self.domain_windows))


def encode_window(window: Window, dtype: np.dtype) -> bytes:
    """A window as a stream holds it: two bytes a token for most vocabularies, and one where some are not to be learned.

    Number of segments and their lengths in pairs (int32), the segments' tokens (one more each than it has pairs), and,
    if a label of a real token is ignored, one uint8 a pair that says so.
    """
    filled = int((window.document_ids != PADDING_DOCUMENT).sum())
    lengths = np.bincount(window.document_ids[:filled]).astype("<i4")
    ignored = window.labels[:filled] == IGNORE_INDEX
    tokens, start = [], 0
    for count in lengths:
        end = start + count
        last = window.labels[end - 1]
        tokens += [window.input_ids[start:end], [0 if last == IGNORE_INDEX else last]]
        start = end
    parts = [np.array([len(lengths)], "<i4"), lengths, np.concatenate(tokens).astype(dtype)]
    if ignored.any():
        parts.append(ignored.astype(np.uint8))
    return b"".join(part.tobytes() for part in parts)


def decode_window(item: bytes, length: int, dtype: np.dtype) -> Window:
    """The window that `encode_window` was given."""
    (count,) = np.frombuffer(item, "<i4", 1)
    lengths = np.frombuffer(item, "<i4", count, offset=4)
    filled = int(lengths.sum())
    offset = 4 + 4 * int(count)
    tokens = np.frombuffer(item, dtype, filled + count, offset=offset)
    inputs, positions = np.zeros((2, length), dtype=np.int64)
    labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
    documents = np.full(length, PADDING_DOCUMENT, dtype=np.int64)
    start = 0
    for segment, pairs in enumerate(lengths):
        part, first = slice(start, start + pairs), start + segment
        inputs[part] = tokens[first : first + pairs]
        labels[part] = tokens[first + 1 : first + pairs + 1]
        positions[part] = np.arange(pairs)
        documents[part] = segment
        start += pairs
    ignored = np.frombuffer(item, np.uint8, offset=offset + tokens.nbytes)
    if len(ignored):
        labels[:filled][ignored != 0] = IGNORE_INDEX
    return Window(inputs, labels, positions, documents)


def _read_record(place: str) -> dict[str, Any]:
    try:
        record = json.loads(bytes(_dataset(f"{place}/meta")[0]))
    except InputError:
        raise
    except Exception as error:  # whatever the storage's client raises
        raise InputError(f"{place}: no stream can be read there ({' '.join(str(error).split())})") from None
    if record["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{place}: format version {record['format_version']}, this program reads {FORMAT_VERSION}; write it anew"
        )
    return record


def _dataset(place: str) -> Any:
    """litdata's items at a place, by index; they are views of memory that is gone when another chunk is read."""
    items = _litdata().StreamingDataset(place)
    items[0]  # opens the cache
    items.on_demand_bytes = False  # fetch whole chunks: else every item is two requests to the storage
    return items


def _litdata() -> ModuleType:
    try:
        import litdata.streaming
    except ImportError:
        raise InputError("a streamed corpus needs the package litdata: pip install litdata") from None
    return litdata.streaming
