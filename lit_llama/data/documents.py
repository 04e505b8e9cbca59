"""Reading documents: folders of txt, md, html, pdf, jsonl and parquet files -> cleaned text, one piece a document.

What cannot be read becomes a `Skipped` with its reason, never an exception: one bad file does not end a long run.
`chunks` cuts a source into shares that are cheap to send to a worker process; `read` makes documents of one there.
How one file's bytes become text is `extraction`'s, the way from documents to a token store `corpus`'s.
"""

import codecs
import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lit_llama.data.extraction import Unusable, clean, declared_encoding, decode, html_text, pdf_text
from lit_llama.errors import InputError

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
GZIPPED = ("text", "html", "jsonl")

CHUNK_BYTES = 1 << 20
CHUNK_DOCUMENTS = 256

LIBRARIES = {"pypdf": "PDF", "selectolax": "HTML", "pyarrow": "Parquet"}


class Document(NamedTuple):
    """One cleaned text: a file, or row `row` of one. `fallback` says that it was read as Windows-1252."""

    file: str
    row: int | None
    text: str
    fallback: bool = False

    @property
    def name(self) -> str:
        """`file`, or `file#row`."""
        return self.file if self.row is None else f"{self.file}#{self.row}"


class Skipped(NamedTuple):
    """A file, or a row of `file`, that gave no document, and why."""

    file: str
    reason: str
    row: int | None = None


class FileChunk(NamedTuple):
    """Files of one document each."""

    files: list[str]
    source_bytes: int


class RowChunk(NamedTuple):
    """Consecutive rows of one file, from row `first` (counted from 1): JSON lines, or (title, text) of Parquet."""

    file: str
    first: int
    rows: list[Any]
    source_bytes: int


def find_files(sources: Iterable[Path | str]) -> Iterator[tuple[str, int] | Skipped]:
    """Walk files and folders in a fixed order and yield (path, bytes) of those of a known format.

    Hidden files and folders below a source are passed over in silence; links are followed, each folder entered once.

    Raises:
        InputError: a source does not exist.
    """
    entered: set[tuple[int, int]] = set()
    for source in map(Path, sources):
        if not source.exists():
            raise InputError(f"{source}: no such file or folder")
        yield from _walk(source, entered)


def _walk(path: Path, entered: set[tuple[int, int]]) -> Iterator[tuple[str, int] | Skipped]:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            if (status.st_dev, status.st_ino) in entered:
                return
            entered.add((status.st_dev, status.st_ino))
            for name in sorted(os.listdir(path)):
                if not name.startswith("."):
                    yield from _walk(path / name, entered)
            return
    except OSError as error:
        yield Skipped(str(path), f"unreadable: {error.strerror}")
        return
    if not stat.S_ISREG(status.st_mode):
        yield Skipped(str(path), "not a regular file")
    elif format_of(path) is None:
        yield Skipped(str(path), f"unknown suffix '{''.join(path.suffixes[-2:])}'")
    elif status.st_size == 0:
        yield Skipped(str(path), "empty")
    else:
        yield str(path), status.st_size


def format_of(path: Path | str) -> str | None:
    """The format that the file's suffix names: "text", "html", "pdf", "jsonl" or "parquet"; None if unknown."""
    path = Path(path)
    if path.suffix.lower() != ".gz":
        return FORMATS.get(path.suffix.lower())
    inner = FORMATS.get(path.with_suffix("").suffix.lower())
    return inner if inner in GZIPPED else None


def chunks(
    sources: Iterable[Path | str], text_key: str, title_key: str | None = None
) -> Iterator[FileChunk | RowChunk | Skipped]:
    """Cut the sources into shares of about a megabyte, in a fixed order, reading only what must be read in sequence."""
    files: list[str] = []
    size = 0
    for found in find_files(sources):
        if isinstance(found, Skipped):
            yield found
            continue
        file, file_size = found
        rows_of = {"jsonl": _jsonl_chunks, "parquet": _parquet_chunks}.get(format_of(file))
        if rows_of is None:
            files.append(file)
            size += file_size
        if files and (rows_of is not None or size >= CHUNK_BYTES or len(files) >= CHUNK_DOCUMENTS):
            yield FileChunk(files, size)
            files, size = [], 0
        if rows_of is not None:
            try:
                yield from rows_of(file, text_key, title_key)
            except InputError:
                raise
            except Exception as error:  # parsers of damaged files raise what they like
                yield Skipped(file, _unreadable(error))
    if files:
        yield FileChunk(files, size)


def _jsonl_chunks(file: str, text_key: str, title_key: str | None) -> Iterator[RowChunk | Skipped]:
    with open(file, "rb") as raw:
        lines = gzip.open(raw, "rb") if file.lower().endswith(".gz") else raw
        rows: list[bytes] = []
        first, size, before = 1, 0, 0
        damage = None
        while damage is None:
            try:
                line = lines.readline()
            except (OSError, EOFError, zlib.error) as error:
                damage, line = error, b""
            if line:
                rows.append(line)
                size += len(line)
            if rows and (not line or size >= CHUNK_BYTES or len(rows) >= CHUNK_DOCUMENTS):
                yield RowChunk(file, first, rows, raw.tell() - before)
                rows, first, size, before = [], first + len(rows), 0, raw.tell()
            if not line:
                break
        if damage is not None:
            yield Skipped(file, f"{_unreadable(damage)}; only the {first - 1} rows before that are used")


def _parquet_chunks(file: str, text_key: str, title_key: str | None) -> Iterator[RowChunk | Skipped]:
    _require("pyarrow", file)
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        columns = table.schema_arrow.names
        if text_key not in columns:
            yield Skipped(file, f"no column '{text_key}' (columns: {', '.join(columns)})")
            return
        wanted = [text_key] + ([title_key] if title_key in columns else [])
        bytes_per_row = os.path.getsize(file) / max(1, table.metadata.num_rows)
        first = 1
        for batch in table.iter_batches(batch_size=CHUNK_DOCUMENTS, columns=wanted):
            texts = batch.column(text_key).to_pylist()
            titles = batch.column(title_key).to_pylist() if len(wanted) > 1 else [None] * len(texts)
            yield RowChunk(file, first, list(zip(titles, texts, strict=True)), round(len(texts) * bytes_per_row))
            first += len(texts)


def read(chunk: FileChunk | RowChunk, text_key: str, title_key: str | None = None) -> Iterator[Document | Skipped]:
    """The documents of a chunk, cleaned, in order; what gives none comes as `Skipped`.

    Args:
        chunk: From `chunks`.
        text_key: Key or column of the text in JSON lines and Parquet rows.
        title_key: Key or column of a title to put above the text, where a row has one.

    Raises:
        InputError: the library that reads this format is not installed.
    """
    if isinstance(chunk, FileChunk):
        for file in chunk.files:
            yield _read_file(file)
        return
    for number, row in enumerate(chunk.rows, start=chunk.first):
        try:
            pair = _read_json_row(row, text_key, title_key) if isinstance(row, bytes) else row
            if pair is None:
                continue
            title, body = pair
            if not isinstance(body, str):
                raise Unusable(f"'{text_key}' is {type(body).__name__}, not text")
            text = clean(f"{title}\n\n{body}" if isinstance(title, str) and title.strip() else body)
            yield Document(chunk.file, number, text) if text else Skipped(chunk.file, "empty", number)
        except Unusable as error:
            yield Skipped(chunk.file, str(error), number)


def _read_json_row(line: bytes, text_key: str, title_key: str | None) -> tuple[Any, Any] | None:
    """(title or None, text) of a JSON line; None for a blank line. Raises Unusable with the reason."""
    line = line.removeprefix(codecs.BOM_UTF8).strip()
    if not line:
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise Unusable("not a line of JSON") from None
    if not isinstance(row, dict):
        raise Unusable("not a JSON object")
    if text_key not in row:
        raise Unusable(f"no key '{text_key}'")
    return row.get(title_key) if title_key else None, row[text_key]


def _read_file(file: str) -> Document | Skipped:
    kind = format_of(file)
    if kind in ("html", "pdf"):
        _require({"html": "selectolax", "pdf": "pypdf"}[kind], file)
    try:
        data = Path(file).read_bytes()
        if file.lower().endswith(".gz"):
            data = gzip.decompress(data)
        fallback = False
        if kind == "pdf":
            text = pdf_text(data)
        elif kind == "html":
            markup, fallback = decode(data, declared=declared_encoding(data))
            text = html_text(markup)
        else:
            text, fallback = decode(data)
    except Unusable as error:
        return Skipped(file, str(error))
    except Exception as error:  # a damaged file makes the parsers raise what they like
        return Skipped(file, _unreadable(error))
    text = clean(text)
    if text:
        return Document(file, None, text, fallback)
    return Skipped(file, {"pdf": "PDF without text (scanned? run OCR first)"}.get(kind, "empty"))


def _unreadable(error: BaseException) -> str:
    return f"unreadable: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _require(module: str, file: str) -> None:
    try:
        __import__(module)
    except ImportError:
        raise InputError(
            f"{file}: reading {LIBRARIES[module]} needs {module}; pip install 'lit-llama[documents]'"
        ) from None
