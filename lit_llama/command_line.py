"""How every script becomes a command: arguments from the signature, one-line errors, exit statuses.

`run(main)` turns the typed signature and docstring of `main` into `--name value` options (dataclass arguments become
groups, `--train.learning_rate 2e-4`), with `--config run.yaml` and `--print_config`. Progress goes to stderr and
results to stdout, so that output can be piped. Exit status: 0 success, 1 failure, 2 wrong arguments or input.
"""

import errno
import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from lit_llama.errors import InputError, RunError


def run(main: Callable[..., Any], arguments: list[str] | None = None) -> Any:
    """Parse the command line into the arguments of `main` and call it; never returns after an error.

    A `main` that takes one dataclass gets its fields as top-level options.
    """
    from jsonargparse import ArgumentParser, auto_cli, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the strings under dataclass fields are their help
    (first, *others) = inspect.signature(main, eval_str=True).parameters.values()
    try:
        if others or not is_dataclass(first.annotation):
            return auto_cli(main, args=arguments, as_positional=False, allow_abbrev=False)
        parser = ArgumentParser(description=first.annotation.__doc__, allow_abbrev=False)
        parser.add_argument("--config", action="config", help="Path to a configuration file.")
        parser.add_class_arguments(first.annotation, as_positional=False)
        values = parser.instantiate(parser.parse_args(arguments))
        return main(first.annotation(**{item.name: values[item.name] for item in fields(first.annotation)}))
    except InputError as error:
        stop(error, 2)
    except RunError as error:
        stop(error, 1)
    except KeyboardInterrupt:
        stop("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: silence the interpreter's own flush at exit, as `cat` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        # Libraries that write files themselves wrap the operating system's error in one of their own.
        if not any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            raise
        stop(f"the disk is full ({error}); nothing half-written was left: free some space and run again", 1)


def stop(message: object, status: int) -> None:
    """Print one line on stderr and leave with `status`."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def progress(message: str) -> None:
    """A line of progress for the user, on stderr."""
    print(message, file=sys.stderr, flush=True)


class StatusLine:
    """One line that is rewritten on a terminal; elsewhere a line now and then, so that logs stay short."""

    def __init__(self, seconds_between_lines: float = 10.0) -> None:
        self._terminal = sys.stderr.isatty()
        self._between = seconds_between_lines
        self._shown_at = -math.inf
        self._visible = False

    def show(self, text: str, last: bool = False) -> None:
        """Replace the line; off a terminal, print it if the last one was some time ago."""
        if self._terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
            self._visible = True
        elif last or time.monotonic() - self._shown_at >= self._between:
            progress(text)
            self._shown_at = time.monotonic()

    def clear(self) -> None:
        """Leave what is shown on a line of its own."""
        if self._visible:
            print(file=sys.stderr, flush=True)
            self._visible = False


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, in all) that keeps a status line of them."""
    line = StatusLine()
    try:
        yield lambda done, count: line.show(f"{what}: {done:,} of {count:,}", last=done == count)
    finally:
        line.clear()
