"""Scripts as commands: options from signatures and dataclasses, one-line errors, exit statuses."""

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lit_llama.command_line import run
from lit_llama.errors import InputError, RunError


@dataclass
class Inner:
    """Inner options."""

    rate: float = 0.5
    """How fast."""


@dataclass(kw_only=True)
class Arguments:
    """Outer options."""

    path: Path
    """Where."""
    inner: Inner = field(default_factory=Inner)
    names: list[str] = field(default_factory=list)


def test_fields_of_one_dataclass_are_top_level_options(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    def main(arguments: Arguments) -> Arguments:
        return arguments

    config = tmp_path / "run.yaml"
    config.write_text("path: a\ninner:\n  rate: 2\nnames: [x]\n")
    assert run(main, ["--config", str(config), "--names", "[y, z]"]) == Arguments(
        path=Path("a"), inner=Inner(2.0), names=["y", "z"]
    )
    with pytest.raises(SystemExit) as stopped:
        run(main, ["--help"])
    assert stopped.value.code == 0
    assert "How fast." in (output := capsys.readouterr().out) and "--inner.rate" in output
    with pytest.raises(SystemExit) as stopped:
        run(main, ["--path", "a", "--inner.rat", "1"])
    assert stopped.value.code == 2


def test_parameters_of_a_function_are_options() -> None:
    def main(*, path: Path, count: int = 3) -> tuple[Path, int]:
        """Do it."""
        return path, count

    assert run(main, ["--path", "x"]) == (Path("x"), 3)


@pytest.mark.parametrize(
    "error,status,message",
    [
        (InputError("config.json: bad\nfield"), 2, "error: config.json: bad field\n"),
        (RunError("loss is nan"), 1, "error: loss is nan\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/x"), 1, "error: the disk is full"),
        (ValueError(f"safetensors: {os.strerror(errno.ENOSPC)} (os error 28)"), 1, "error: the disk is full"),
    ],
)
def test_errors_of_users_and_machines_are_one_line(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture
) -> None:
    def main(*, path: str = "") -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(main, [])
    assert stopped.value.code == status
    printed = capsys.readouterr().err
    assert printed.startswith(message) and printed.count("\n") == 1


def test_a_bug_keeps_its_traceback() -> None:
    def main(*, path: str = "") -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main, [])
