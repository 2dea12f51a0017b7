"""Errors that users can mend. Every other exception is a defect and keeps its traceback."""

from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: an input, a setting or the machine.

    The message says what is wrong and how to mend it. The command prints the message alone and exits with code 2.
    """


class ConfigError(UserError):
    """All problems of a command or its config, reported together.

    Args:
        messages: one problem each: what, the value, the limit, the remedy.
    """

    def __init__(self, messages: Iterable[str]) -> None:
        self.messages = tuple(messages)
        super().__init__("\n".join(self.messages))
