"""Writing files so that a reader never meets half of one.

Everything is written under a temporary name beside its destination and renamed when complete: a crash, a full disk or a
second process leaves either the old content or the new, never a mixture.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_llama.errors import InputError


@contextmanager
def atomic_file(path: Path | str, mode: str = "w") -> Iterator[Any]:
    """Open a temporary file beside `path` for writing and rename it to `path` on success; remove it on any error."""
    with atomic_path(path) as temporary, open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` for a library that writes by name; renamed on success, removed on error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path` to fill; it takes the name `path` on success and vanishes on any error.

    Raises:
        InputError: `path` exists, is not an empty directory, and `overwrite` is false.
    """
    path = Path(path)
    refuse_overwrite(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    temporary.chmod(0o755)  # mkdtemp gives 0700, which would hide a shared checkpoint from the group
    try:
        yield temporary
        if path.exists():
            replaced = temporary.with_suffix(".old")
            path.rename(replaced)
            temporary.rename(path)
            shutil.rmtree(replaced)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_overwrite(path: Path | str, overwrite: bool) -> None:
    """Raise InputError when `path` holds something already and the user did not say `--overwrite`."""
    path = Path(path)
    holds_something = any(path.iterdir()) if path.is_dir() else path.exists()
    if holds_something and not overwrite:
        raise InputError(f"{path} exists already; choose another output or pass --overwrite true to replace it")


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Non-finite numbers are an error: they are not JSON."""
    with atomic_file(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path: Path | str) -> Any:
    """Read one JSON file; a missing or malformed file is an InputError that names it."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def read_jsonl(path: Path | str) -> list[dict]:
    """Read a JSON Lines file of objects; blank lines are skipped, any line that is no object is an InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    rows = []
    with open(path, encoding="utf-8", errors="strict") as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
                rows.append(row)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return rows
