"""How every script becomes a command: arguments from the signature, one-line errors, exit statuses.

`run(main)` turns the typed signature and docstring of `main` into `--name value` options (dataclass arguments become
groups, `--train.learning_rate 2e-4`), with `--config run.yaml` and `--print_config`. Progress goes to stderr and results to
stdout, so that output can be piped. Exit status: 0 success, 1 failure, 2 wrong arguments or input.
"""

import errno
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

from lit_llama.errors import InputError, RunError


def run(main: Callable[..., Any], arguments: list[str] | None = None) -> Any:
    """Parse the command line into the arguments of `main` and call it; never returns after an error.

    A `main` that takes one dataclass gets its fields as top-level options.
    """
    from jsonargparse import auto_cli

    (first, *others) = inspect.signature(main, eval_str=True).parameters.values()
    try:
        if not others and is_dataclass(first.annotation):
            return main(auto_cli(first.annotation, args=arguments, as_positional=False))
        return auto_cli(main, args=arguments, as_positional=False)
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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        stop(f"no space left on the device while writing {error.filename or 'the output'}; free some and run again", 1)


def stop(message: object, status: int) -> None:
    """Print one line on stderr and leave with `status`."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def progress(message: str) -> None:
    """A line of progress for the user, on stderr."""
    print(message, file=sys.stderr, flush=True)
