"""The token store: tokenized documents on disk, memory-mapped, with the tokenizer they belong to.

`data_dir/{train,val}/` hold `tokens.bin` (little-endian uint16 if vocab_size <= 65536, else uint32), `documents.npy`
(int64 offsets into it, num_documents + 1) and, only where some token is not to be learned, `loss_mask.bin` (uint8, 1 =
learn). Where some documents are views of one source (a text, its paraphrase, questions on it), `groups.npy` (int64, one
a document) gives these the same number, and -1 to documents without other views; `packing` keeps views apart.
Where some tokens are to be learned from a teacher's probabilities, `teacher_ids.bin` (like tokens.bin) and
`teacher_probabilities.bin` (float16) hold for each token of the split the likeliest ids at its place, and 0 for the
rest of the tokens; `"teacher_top_k"` in `meta.json` says how many.
Where `meta.json` says `"examples": true`, documents are conversations (`instructions`) and `packing` never cuts one.
`data_dir/meta.json` says with which tokenizer, from what and by which command they were made, and their counts.
Cutting documents into training windows is `packing`'s; making tokens out of text is `scripts/prepare_corpus.py`'s.
"""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from lit_llama.errors import InputError
from lit_llama.files import atomic_directory, holds_something, read_json, refuse_overwrite, write_json

FORMAT_VERSION = 1
NO_GROUP = -1


class TokenStore:
    """One split of a token store, memory-mapped: opening it costs memory for the document offsets only.

    Attributes:
        tokens: (num_tokens,) uint16 or uint32, all documents one after the other.
        loss_mask: (num_tokens,) uint8, 1 where the token is to be learned; None where that is everywhere.
        groups: (num_documents,) int64, equal for documents that are views of one source, -1 for those that are views
            of none; None where all are.
        teacher: ids (num_tokens, k) and probabilities (num_tokens, k) float16 that a teacher gives for each token's
            place, all probabilities 0 where it was not asked; None where it never was.
        offsets: (num_documents + 1,) int64; document i is `tokens[offsets[i]:offsets[i + 1]]`.
        meta: the content of `meta.json`.
        num_words, num_bytes: of the split's text (whitespace-separated words; UTF-8), without special tokens.
    """

    def __init__(
        self,
        data_dir: Path,
        split: str,
        tokens: np.ndarray,
        loss_mask: np.ndarray | None,
        offsets: np.ndarray,
        groups: np.ndarray | None,
        meta: dict[str, Any],
        teacher: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self.data_dir, self.split, self.teacher = data_dir, split, teacher
        self.tokens, self.loss_mask, self.offsets, self.groups, self.meta = tokens, loss_mask, offsets, groups, meta
        self.num_documents, self.num_tokens = len(offsets) - 1, len(tokens)
        self.num_words, self.num_bytes = meta["splits"][split]["words"], meta["splits"][split]["bytes"]
        self.vocab_size: int = meta["vocab_size"]

    @classmethod
    def open(cls, data_dir: Path | str, split: str, tokenizer_sha256: str | None = None) -> Self:
        """Open `data_dir/split` after checking that it is complete and, where a hash is given, made by that tokenizer.

        Raises:
            InputError: no store or no such split there, another format version, files that do not fit each other
                (interrupted copy), or tokens of another tokenizer.
        """
        data_dir = Path(data_dir)
        meta_file = data_dir / "meta.json"
        if not meta_file.is_file():
            raise InputError(
                f"{data_dir} is not a token store (no meta.json in it); make one by scripts/prepare_corpus.py or"
                " scripts/prepare_instructions.py"
            )
        meta = read_json(meta_file)
        version = meta.get("format_version") if isinstance(meta, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(
                f"{meta_file}: format version {version}, this program reads {FORMAT_VERSION}; prepare it anew"
            )
        check_origin(data_dir, meta, split, tokenizer_sha256)
        counts = meta["splits"][split]

        offsets_file = data_dir / split / "documents.npy"
        offsets = _load_array(offsets_file)
        fits = offsets.dtype == np.int64 and offsets.shape == (counts["documents"] + 1,)
        if not fits or offsets[0] != 0 or offsets[-1] != counts["tokens"] or (np.diff(offsets) < 0).any():
            raise InputError(
                f"{offsets_file}: not the offsets of {counts['documents']} documents with {counts['tokens']} tokens; "
                "prepare the store anew"
            )
        groups = None
        if counts.get("groups"):  # absent in stores made before there were groups
            groups_file = data_dir / split / "groups.npy"
            groups = _load_array(groups_file)
            if groups.dtype != np.int64 or groups.shape != (counts["documents"],) or groups.min() < NO_GROUP:
                raise InputError(
                    f"{groups_file}: not the groups of {counts['documents']} documents; prepare the store anew"
                )
        tokens = _map(data_dir / split / "tokens.bin", token_dtype(meta["vocab_size"]), counts["tokens"])
        has_mask = counts["loss_mask"]
        loss_mask = _map(data_dir / split / "loss_mask.bin", np.dtype("u1"), counts["tokens"]) if has_mask else None
        teacher = None
        if top_k := meta.get("teacher_top_k"):
            shape, directory = (counts["tokens"], top_k), data_dir / split
            ids = _map(directory / "teacher_ids.bin", token_dtype(meta["vocab_size"]), *shape)
            teacher = ids, _map(directory / "teacher_probabilities.bin", np.dtype("<f2"), *shape)
        return cls(data_dir, split, tokens, loss_mask, offsets, groups, meta, teacher)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens (length,) of document `index` and its loss mask (length,) uint8, or None where all are learned."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        part = self._part(index)
        return self.tokens[part], None if self.loss_mask is None else self.loss_mask[part]

    def teacher_of(self, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The teacher's ids (length, k) and probabilities (length, k) for the tokens of document `index`."""
        return None if self.teacher is None else tuple(array[self._part(index)] for array in self.teacher)

    def _part(self, index: int) -> slice:
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))


def check_origin(place: Path | str, meta: dict[str, Any], split: str, tokenizer_sha256: str | None) -> None:
    """Raise InputError unless the record `meta` of prepared tokens has that split and, where given, that tokenizer."""
    tokenizer = meta["tokenizer"]
    if tokenizer_sha256 is not None and tokenizer_sha256 != tokenizer["sha256"]:
        raise InputError(
            f"{place} was tokenized by another tokenizer (SHA-256 {tokenizer['sha256']}, from {tokenizer['source']})"
            f" than the checkpoint's ({tokenizer_sha256}); prepare it with this one"
        )
    if split not in meta["splits"]:
        raise InputError(f"{place} has no split '{split}', only: {', '.join(meta['splits'])}")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest little-endian type of a token store that holds every id of the vocabulary."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def _load_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}); prepare the store anew") from None


def _map(path: Path, dtype: np.dtype, *shape: int) -> np.ndarray:
    expected = math.prod(shape) * dtype.itemsize
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        state = "missing" if found is None else f"{found} bytes"
        raise InputError(f"{path}: {state}, meta.json promises {expected} bytes; copy or prepare the store anew")
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)


@dataclass
class _SplitFiles:
    """What the writer holds of one split: open files, and 16 bytes a document for offsets and groups."""

    directory: Path
    tokens: BinaryIO
    offsets: array = field(default_factory=lambda: array("q", [0]))
    groups: array = field(default_factory=lambda: array("q"))
    loss_mask: BinaryIO | None = None
    teacher: tuple[BinaryIO, BinaryIO] | None = None
    words: int = 0
    bytes: int = 0


class TokenStoreWriter:
    """Writes a token store document by document; the store appears under its name, complete, when the block ends.

    ```
    with TokenStoreWriter(data_dir, tokenizer.vocab_size, tokenizer.sha256, str(checkpoint_dir)) as writer:
        writer.add("train", tokenizer.encode(text), num_words=len(text.split()), num_bytes=len(text.encode()))
    ```
    An exception inside the block leaves nothing behind. `writer.directory` is the directory in the making, for files
    that shall come with the store.

    Args:
        data_dir: The store to be.
        vocab_size: Ids must lie below it.
        tokenizer_sha256: `Tokenizer.sha256`; readers with another one are refused.
        tokenizer_source: Where the tokenizer came from, for messages and the record.
        sources: Where the text came from, for the record.
        command: The command line, for the record.
        overwrite: Replace an existing store (and nothing but a store).
        extra: More entries of `meta.json`; see `lit_llama.data.instructions`.
        teacher_top_k: How many ids a teacher gives at each place, where there is one.
    """

    def __init__(
        self,
        data_dir: Path | str,
        vocab_size: int,
        tokenizer_sha256: str,
        tokenizer_source: str,
        *,
        sources: Iterable[str] = (),
        command: str = "",
        overwrite: bool = False,
        extra: Mapping[str, Any] | None = None,
        teacher_top_k: int = 0,
    ) -> None:
        self.data_dir, self.teacher_top_k = Path(data_dir), teacher_top_k
        self.vocab_size, self.dtype = vocab_size, token_dtype(vocab_size)
        self.tokenizer = {"sha256": tokenizer_sha256, "source": tokenizer_source}
        self.sources, self.command = list(sources), command
        self.overwrite = overwrite
        self.extra = dict(extra or {}) | ({"teacher_top_k": teacher_top_k} if teacher_top_k else {})
        self._splits: dict[str, _SplitFiles] = {}

    def __enter__(self) -> Self:
        refuse_store_overwrite(self.data_dir, self.overwrite)
        with ExitStack() as stack:
            self.directory = stack.enter_context(atomic_directory(self.data_dir, self.overwrite))
            self._stack = stack.pop_all()
        return self

    def add(
        self,
        split: str,
        tokens: Sequence[int] | np.ndarray,
        loss_mask: Sequence[int] | np.ndarray | None = None,
        *,
        num_words: int = 0,
        num_bytes: int = 0,
        group: int | None = None,
        teacher: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Append one document to a split.

        Args:
            split: "train" or "val".
            tokens: (length,) ids, special tokens included; at least one.
            loss_mask: (length,) of 0 and 1, 1 where the token is to be learned; None for everywhere.
            num_words: Words of the document's text, for the counts.
            num_bytes: UTF-8 bytes of the document's text, for the counts and bits per byte.
            group: Number from 0 that all views of one source share; None for a document without other views.
            teacher: Ids (length, k) and probabilities (length, k) for the tokens' places, with `teacher_top_k`.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"a document is at least one token id in 0..{self.vocab_size - 1}, got shape {ids.shape}")
        if group is not None and group < 0:
            raise ValueError(f"group {group}: must be 0 or more")
        files = self._splits.get(split)
        if files is None:
            directory = self.directory / split
            directory.mkdir()
            files = _SplitFiles(directory, self._stack.enter_context(open(directory / "tokens.bin", "wb")))
            self._splits[split] = files

        mask = np.ones(len(ids), np.uint8) if loss_mask is None else np.asarray(loss_mask, dtype=np.uint8)
        if mask.shape != ids.shape or mask.max() > 1:
            raise ValueError(f"loss mask of shape {mask.shape} for {len(ids)} tokens, expected as many zeros and ones")
        if files.loss_mask is None and not mask.all():
            files.loss_mask = self._stack.enter_context(open(files.directory / "loss_mask.bin", "wb"))
            _write_ones(files.loss_mask, files.offsets[-1])
        if files.loss_mask is not None:
            files.loss_mask.write(mask.tobytes())
        if self.teacher_top_k:
            self._add_teacher(files, len(ids), teacher)
        files.tokens.write(ids.astype(self.dtype).tobytes())
        files.offsets.append(files.offsets[-1] + len(ids))
        files.groups.append(NO_GROUP if group is None else group)
        files.words += num_words
        files.bytes += num_bytes

    def _add_teacher(self, files: _SplitFiles, length: int, teacher: tuple[np.ndarray, np.ndarray] | None) -> None:
        if files.teacher is None:
            names = ("teacher_ids.bin", "teacher_probabilities.bin")
            files.teacher = tuple(self._stack.enter_context(open(files.directory / name, "wb")) for name in names)
        shape = (length, self.teacher_top_k)
        for file, values, dtype in zip(files.teacher, teacher or (None, None), (self.dtype, "<f2"), strict=True):
            array = np.zeros(shape, dtype) if values is None else np.asarray(values).astype(dtype)
            if array.shape != shape:
                raise ValueError(f"a teacher's values of shape {array.shape} for a document of {shape}")
            file.write(array.tobytes())

    def counts(self) -> dict[str, dict[str, int | bool]]:
        """Of each split so far: documents, tokens, words, bytes, and whether it has a loss mask and groups."""
        return {
            split: {
                "documents": len(files.offsets) - 1,
                "tokens": files.offsets[-1],
                "words": files.words,
                "bytes": files.bytes,
                "loss_mask": files.loss_mask is not None,
                "groups": any(group != NO_GROUP for group in files.groups),
            }
            for split, files in sorted(self._splits.items())
        }

    def __exit__(self, *exception: Any) -> bool | None:
        if exception[0] is None:
            try:
                self._finish()
            except BaseException as error:
                self._stack.__exit__(type(error), error, error.__traceback__)
                raise
        return self._stack.__exit__(*exception)

    def _finish(self) -> None:
        if not self._splits:
            raise InputError(f"no document for {self.data_dir}; nothing was written")
        for files in self._splits.values():
            np.save(files.directory / "documents.npy", np.frombuffer(files.offsets, dtype=np.int64))
            groups = np.frombuffer(files.groups, dtype=np.int64)
            if (groups != NO_GROUP).any():
                np.save(files.directory / "groups.npy", groups)
        meta = self.extra | {
            "format_version": FORMAT_VERSION,
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            "splits": self.counts(),
            "sources": self.sources,
            "command": self.command,
        }
        write_json(self.directory / "meta.json", meta)


def _write_ones(file: BinaryIO, count: int) -> None:
    block = b"\x01" * (1 << 20)
    for start in range(0, count, len(block)):
        file.write(block[: count - start])


def refuse_store_overwrite(data_dir: Path, overwrite: bool) -> None:
    """Raise InputError unless `data_dir` is free, or is a token store and `overwrite` allows to replace it."""
    refuse_overwrite(data_dir, overwrite)
    if holds_something(data_dir) and not (data_dir / "meta.json").is_file():
        raise InputError(
            f"{data_dir} holds something that is not a token store and is not replaced; choose another --data_dir"
        )
