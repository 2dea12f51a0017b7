"""Errors that users can fix. Every other exception but OSError is a bug and keeps its traceback."""

from collections.abc import Iterable


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
