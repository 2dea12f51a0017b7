"""Errors that users can fix. Every other exception but OSError is a bug and keeps its traceback."""

import sys
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Raised for something that the user can fix: an input, a setting or the machine.

    The message says what is wrong and how to fix it. The command prints only the message and exits with code 2.
    """


class ConfigError(UserError):
    """All problems of a command or its config, reported together.

    Args:
        messages: one per problem. Each says what is wrong, the value, the limit and the remedy.
    """

    def __init__(self, messages: Iterable[str]) -> None:
        self.messages = tuple(messages)
        super().__init__("\n".join(self.messages))


def require_checks() -> None:
    """Refuse a Python that removes assertions, and docstrings, which transformers reads.

    Raises:
        UserError: it was started with -O or PYTHONOPTIMIZE.
    """
    if sys.flags.optimize:
        option = f"-{'O' * sys.flags.optimize}, or PYTHONOPTIMIZE={sys.flags.optimize}"
        raise UserError(f"Python runs with {option}, which removes checks that recondense needs; run without it")


class WrongExport(AssertionError):
    """An exported folder is not the model that was exported. It keeps its traceback, because no input is the reason.

    Args:
        folder: the folder, which was not written.
        problem: how the folder differs from the model.
    """

    def __init__(self, folder: Path, problem: str) -> None:
        super().__init__(
            f"{folder} was not written, because {problem}. This is a defect of recondense or of a library; please "
            "report it. Try another export.format; export.verify=shapes does not compare what the folder computes"
        )
