"""The two ways in which a command can end badly without being a bug of this project.

Both are shown to the user as one line (`lit_llama.command_line`): say what is wrong, where, and what to do.
"""


class InputError(ValueError):
    """What the user gave cannot be used: a wrong file, key, shape or argument. Exit status 2."""


class RunError(RuntimeError):
    """The input was fine and the run still failed: loss not finite, disk full. Exit status 1."""
