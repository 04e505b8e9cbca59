"""Writing files so that a reader never meets half of one.

Everything is written under a temporary name beside its destination, flushed to the disk and renamed when complete: a
crash, a power cut, a full disk or a second process leaves either the old content or the new, never a mixture. What a
killed process left under temporary names (`.NAME.PID.tmp`) goes when the same destination is written again.
"""

import ctypes
import errno
import json
import os
import re
import shutil
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


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` for a library that writes by name; renamed on success, removed on error.

    Raises:
        OSError: also where a library had wrapped it: the disk is full; it names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path` to fill; it takes the name `path` on success and vanishes on any error.

    An old directory is swapped with the new one in one step. Where the filesystem cannot do that (NFS, macOS), it bears
    the name `.NAME.old` for the instant between two renames, and a kill in that instant leaves it there.

    Raises:
        InputError: `path` exists, is not an empty directory, and `overwrite` is false.
    """
    path = Path(path)
    refuse_overwrite(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for item in (*temporary.rglob("*"), temporary):
            flush_to_disk(item)
        old = path.with_name(f".{path.name}.old")
        if not (path.exists() and _swap(temporary, path)):
            if path.exists():
                _remove(old)
                os.rename(path, old)
            os.rename(temporary, path)
        flush_to_disk(path.parent)
        _remove(old)
    finally:
        _remove(temporary)  # after a swap, this is the old content


def flush_to_disk(path: Path) -> None:
    """Have the system write a file, or the entries of a directory, before anything that is written after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems cannot do this for directories, and say so by one of these.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says so, also where a library that writes files itself has wrapped the system's error."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return any(os.strerror(number) in str(error) for number in numbers)


def _swap(one: Path, other: Path) -> bool:
    """Swap the names of two directories in one step; False where the system or the filesystem cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux only, and Python has no function for it
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and not renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange)


def _temporary_beside(path: Path) -> Path:
    """A free temporary name beside `path`, after removing what killed processes left under such names."""
    for item in path.parent.iterdir():
        match = re.fullmatch(rf"\.{re.escape(path.name)}\.(\d+)\.tmp", item.name)
        if match and (int(match[1]) == os.getpid() or not _is_running(int(match[1]))):
            _remove(item)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def holds_something(path: Path | str) -> bool:
    """Whether there is a file, or a directory with more in it than what a killed process left of a file."""
    path = Path(path)
    if not path.is_dir():
        return path.exists()
    return any(not re.fullmatch(r"\..+\.\d+\.tmp", item.name) for item in path.iterdir())


def refuse_overwrite(path: Path | str, overwrite: bool) -> None:
    """Raise InputError when `path` holds something already and the user did not say `--overwrite`."""
    if holds_something(path) and not overwrite:
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


def read_yaml(path: Path | str) -> Any:
    """Read one YAML file; a missing or malformed file is an InputError that names it."""
    import yaml

    path = Path(path)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None


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
