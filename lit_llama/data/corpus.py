"""From files to a token store: read, clean, deduplicate, split and tokenize a corpus of any size in constant memory.

Worker processes read and tokenize chunks; this process takes their results in order, so that the store is the same
whatever the number of workers, drops duplicates, splits and writes. The command is `scripts/prepare_corpus.py`.
"""

import hashlib
import heapq
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_llama.command_line import progress
from lit_llama.data.deduplication import Duplicate, DuplicateIndex, minhash, text_digest
from lit_llama.data.documents import Document, FileChunk, RowChunk, Skipped, chunks, find_files, read
from lit_llama.data.token_store import TokenStoreWriter, refuse_store_overwrite, token_dtype
from lit_llama.errors import InputError, RunError
from lit_llama.files import write_json
from lit_llama.tokenizer import Tokenizer

EXAMPLES = 20
LONGEST = 5
PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class CorpusOptions:
    """How documents become tokens; what every worker needs to know.

    Args:
        checkpoint_dir: Directory with the tokenizer of the model to train.
        text_key: Key (JSON lines) or column (Parquet) of the text.
        title_key: Key or column of a title to put above the text, where a row has one.
        near_duplicate_threshold: Jaccard similarity from which the later of two documents is dropped; None to drop
            exact copies only.
        min_characters: Shorter documents are skipped.
    """

    checkpoint_dir: Path
    text_key: str = "text"
    title_key: str | None = None
    near_duplicate_threshold: float | None = 0.8
    min_characters: int = 1


class TokenizedDocument(NamedTuple):
    """What a worker sends back of a document; the text stays there."""

    name: str
    tokens: np.ndarray
    num_words: int
    num_bytes: int
    fallback: bool
    digest: bytes
    signature: np.ndarray | None


def tokenize(chunk: FileChunk | RowChunk, options: CorpusOptions) -> list[TokenizedDocument | Skipped]:
    """Read a chunk and tokenize its documents, each between the tokens that begin and end one."""
    tokenizer = _load_tokenizer(options.checkpoint_dir)
    start = [] if tokenizer.document_start_id is None else [tokenizer.document_start_id]
    end = [] if tokenizer.document_end_id is None else [tokenizer.document_end_id]
    found = list(read(chunk, options.text_key, options.title_key))
    all_ids = iter(tokenizer.encode_batch([document.text for document in found if isinstance(document, Document)]))
    results: list[TokenizedDocument | Skipped] = []
    for document in found:
        if isinstance(document, Skipped):
            results.append(document)
            continue
        ids, text = next(all_ids), document.text
        if len(text) < options.min_characters:
            reason = f"too short (under {options.min_characters} characters)"
            results.append(Skipped(document.file, reason, document.row))
            continue
        result = TokenizedDocument(
            name=document.name,
            tokens=np.array([*start, *ids, *end], dtype=token_dtype(tokenizer.vocab_size)),
            num_words=len(text.split()),
            num_bytes=len(text.encode()),
            fallback=document.fallback,
            digest=text_digest(text),
            signature=None if options.near_duplicate_threshold is None else minhash(text),
        )
        results.append(result)
    return results


@cache
def _load_tokenizer(checkpoint_dir: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(checkpoint_dir)


class _Results(NamedTuple):
    """What became of a chunk, the split it was given for (None: to be decided), and its bytes of the source."""

    documents: list[TokenizedDocument | Skipped]
    split: str | None
    source_bytes: int


def _tokenize_all(
    groups: list[tuple[str | None, list[Path]]], options: CorpusOptions, workers: int
) -> Iterator[_Results]:
    """Tokenize the sources of each (split, sources), in order."""
    todo = ((split, chunk) for split, paths in groups for chunk in chunks(paths, options.text_key, options.title_key))
    if workers == 1:
        for split, chunk in todo:
            is_skipped = isinstance(chunk, Skipped)
            results = [chunk] if is_skipped else tokenize(chunk, options)
            yield _Results(results, split, 0 if is_skipped else chunk.source_bytes)
        return
    # Spawned, not forked: the threads of the tokenizer would not survive a fork.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_prepare_worker)
    try:
        waiting: deque = deque()
        for split, chunk in todo:
            future = None if isinstance(chunk, Skipped) else pool.submit(tokenize, chunk, options)
            waiting.append((split, chunk, future))
            # A few chunks a worker keep all of them busy; more would only fill the memory.
            if len(waiting) > 4 * workers:
                yield _wait(*waiting.popleft())
        while waiting:
            yield _wait(*waiting.popleft())
    except BrokenProcessPool:
        raise RunError("a worker process was killed, out of memory perhaps; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    """Die silently with Ctrl-C and with the parent, and leave the other processors to the other workers."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _wait(split: str | None, chunk: FileChunk | RowChunk | Skipped, future: Future | None) -> _Results:
    return _Results([chunk], split, 0) if future is None else _Results(future.result(), split, chunk.source_bytes)


class _Splitter:
    """Sends each document to train or val by a hash of its text, so that new documents move no old one.

    The document of the smallest hash goes to val and that of the largest to train whatever the fraction, so that no
    split stays empty; these two are held back to the end.
    """

    def __init__(self, writer: TokenStoreWriter, val_fraction: float, seed: int) -> None:
        self.writer, self.val_fraction, self.seed = writer, val_fraction, seed
        self._held: list[tuple[float, TokenizedDocument]] = []

    def add(self, document: TokenizedDocument, split: str | None) -> None:
        if split is not None:
            self._write(split, document)
            return
        key = self.seed.to_bytes(8, "little") + document.digest
        place = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") / 2**64
        self._held.append((place, document))
        self._held.sort(key=lambda pair: pair[0])
        if len(self._held) > 2:
            place, document = self._held.pop(1)
            self._write("val" if place < self.val_fraction else "train", document)

    def finish(self) -> None:
        if len(self._held) == 1 and self.val_fraction > 0:
            raise InputError(
                f"one document only ({self._held[0][1].name}), which cannot be split into train and val: cut it into "
                "files or rows of JSON lines, or pass --val_fraction 0"
            )
        for split, (_, document) in zip(("val", "train"), self._held, strict=False):
            self._write(split if self.val_fraction > 0 else "train", document)

    def _write(self, split: str, document: TokenizedDocument) -> None:
        self.writer.add(split, document.tokens, num_words=document.num_words, num_bytes=document.num_bytes)


@dataclass
class _Report:
    """What happened to the documents; its size grows with the number of skipped files only."""

    documents: int = 0
    exact: int = 0
    near: int = 0
    duplicate_examples: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    fallback: int = 0
    fallback_examples: list[str] = field(default_factory=list)
    longest: list[tuple[int, str]] = field(default_factory=list)

    def skip(self, skipped: Skipped) -> None:
        """Note a skipped file; skipped rows of a file are counted by reason."""
        entry = self.skipped.setdefault(skipped[:2], {"file": skipped.file, "reason": skipped.reason})
        if skipped.row is not None:
            entry["first_row"] = entry.get("first_row", skipped.row)
            entry["rows"] = entry.get("rows", 0) + 1

    def note(self, document: TokenizedDocument, duplicate: Duplicate | None) -> None:
        """Note a document that was read, and what it duplicates."""
        self.documents += 1
        if document.fallback:
            self.fallback += 1
            self.fallback_examples = [*self.fallback_examples, document.name][:EXAMPLES]
        if duplicate is None:
            self.longest = heapq.nlargest(LONGEST, [*self.longest, (len(document.tokens), document.name)])
            return
        self.exact += duplicate.exact
        self.near += not duplicate.exact
        example = {"document": document.name, "of": duplicate.of, "similarity": round(duplicate.similarity, 3)}
        self.duplicate_examples = [*self.duplicate_examples, example][:EXAMPLES]

    def as_json(self, splits: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
        """The report to keep; `splits` are the counts of the store."""
        tokens, words = (sum(counts[unit] for counts in splits.values()) for unit in ("tokens", "words"))
        return {
            "documents_read": self.documents,
            "splits": splits,
            "tokens_per_word": round(tokens / max(1, words), 3),
            "exact_duplicates": self.exact,
            "near_duplicates": self.near,
            "duplicate_examples": self.duplicate_examples,
            "skipped": list(self.skipped.values()),
            "read_as_windows_1252": self.fallback,
            "read_as_windows_1252_examples": self.fallback_examples,
            "longest_documents": [{"document": name, "tokens": length} for length, name in self.longest],
            "seconds": round(seconds, 1),
        }


def prepare_corpus(
    sources: list[Path],
    data_dir: Path,
    options: CorpusOptions,
    *,
    val_sources: list[Path] | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Make a token store of files and folders. Returns the report that is `data_dir/report.json` too.

    Args:
        sources: Files and folders.
        data_dir: The token store to be.
        options: How documents become tokens.
        val_sources: Files and folders that make the split "val"; all of `sources` is "train" then, except what is a
            duplicate of a held-out document.
        val_fraction: Share of documents held out as split "val" without `val_sources`, 0 <= share < 1.
        seed: Of the choice of held-out documents.
        workers: Processes that read and tokenize; None for one a processor.
        overwrite: Replace an existing token store.
        command: The command line, for the record.

    Raises:
        InputError: an argument out of range, a missing source, nothing left to write, one document to be split.
        RunError: a worker was killed, or the temporary index cannot be written.
    """
    all_sources = [*(val_sources or []), *sources]
    _check(all_sources, data_dir, options, val_fraction, seed, workers, overwrite)
    # Held-out documents come first: of two duplicates the later is dropped, and it must be the one to be trained on.
    groups = [("val", val_sources), ("train", sources)] if val_sources else [(None, sources)]
    tokenizer = _load_tokenizer(options.checkpoint_dir)
    files = (found for _, paths in groups for found in find_files(paths))
    total_bytes = sum(found[1] for found in files if not isinstance(found, Skipped))
    report = _Report()
    began = spoke = time.monotonic()
    done_bytes = 0
    with TokenStoreWriter(
        data_dir,
        tokenizer.vocab_size,
        tokenizer.sha256,
        str(options.checkpoint_dir),
        sources=map(str, all_sources),
        command=command,
        overwrite=overwrite,
    ) as writer:
        splitter = _Splitter(writer, val_fraction, seed)
        index_file = writer.directory / "duplicates.sqlite"
        index = DuplicateIndex(index_file, options.near_duplicate_threshold)
        with closing(index), closing(_tokenize_all(groups, options, workers or _processors())) as all_results:
            for results, split, source_bytes in all_results:
                for result in results:
                    if isinstance(result, Skipped):
                        report.skip(result)
                        continue
                    try:
                        duplicate = index.add(result.name, result.digest, result.signature)
                    except sqlite3.OperationalError as error:
                        raise RunError(
                            f"{data_dir}: cannot write the index of duplicates beside it ({error})"
                        ) from None
                    report.note(result, duplicate)
                    if duplicate is None:
                        splitter.add(result, split)
                done_bytes += source_bytes
                if time.monotonic() - spoke >= PROGRESS_SECONDS:
                    spoke = time.monotonic()
                    progress(_progress_line(report.documents, done_bytes, total_bytes, spoke - began))
        index_file.unlink()
        if not report.documents:
            raise InputError(_nothing_left(all_sources, list(report.skipped.values())))
        splitter.finish()
        for split, paths in groups:
            if split is not None and split not in writer.counts():
                raise InputError(
                    f"no document for {split} in {', '.join(map(str, paths))}: none readable and no duplicate"
                )
        seconds = time.monotonic() - began
        progress(_progress_line(report.documents, done_bytes, total_bytes, seconds))
        summary = report.as_json(writer.counts(), seconds)
        write_json(writer.directory / "report.json", summary)
    return summary


def _check(
    sources: list[Path],
    data_dir: Path,
    options: CorpusOptions,
    val_fraction: float,
    seed: int,
    workers: int | None,
    overwrite: bool,
) -> None:
    threshold = options.near_duplicate_threshold
    if not 0 <= val_fraction < 1:
        raise InputError(f"--val_fraction {val_fraction}: must be at least 0 and below 1")
    if threshold is not None and not 0 < threshold <= 1:
        raise InputError(f"--near_duplicate_threshold {threshold}: must be above 0 and at most 1, or null to keep them")
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: must be at least 1")
    if not 0 <= seed < 2**64:
        raise InputError(f"--seed {seed}: must be 0 or more")
    refuse_store_overwrite(data_dir, overwrite)
    for source in sources:
        if source.resolve().is_relative_to(data_dir.resolve()):
            raise InputError(f"{source} lies in the output {data_dir}; choose another --data_dir")


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _progress_line(documents: int, done_bytes: int, total_bytes: int, seconds: float) -> str:
    rate = done_bytes / max(seconds, 1e-9)
    left = f", {(total_bytes - done_bytes) / rate:.0f} s left" if 0 < done_bytes < total_bytes else ""
    share = done_bytes / max(1, total_bytes)
    return f"{documents:,} documents, {share:.0%} of {total_bytes / 1e6:,.1f} MB, {rate / 1e6:.1f} MB/s{left}"


def _nothing_left(sources: list[Path], skipped: list[dict[str, Any]]) -> str:
    reasons = "; ".join(f"{entry['file']}: {entry['reason']}" for entry in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    where = ", ".join(map(str, sources))
    return f"no text in {where} ({reasons or 'no file of a known format'}{more}); nothing was written"
