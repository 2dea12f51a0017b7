"""How a command ends: exit codes, and messages without a traceback for what the user can mend."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from recondense.errors import ConfigError, UserError


class Reported(SystemExit):
    """The end of the process, after its reason was written."""


class JobFailed(Exception):
    """What the user can mend in one job of a sweep; callbacks/sweep.py keeps it from ending the others."""

    def __init__(self, messages: Sequence[str]) -> None:
        self.messages = tuple(messages)
        super().__init__(" ".join(self.messages))


@contextmanager
def exit_codes(*, sweep: bool = False, silent: bool = False) -> Iterator[None]:
    """2 and the message alone for what the user can mend, 130 or 143 for Ctrl-C or SIGTERM; a traceback for all else.

    Args:
        silent: without the message: another process writes the same.
        sweep: in a job of a sweep: what the user can mend is raised as `JobFailed` and does not end the process.
    """
    try:
        with _sigterm_exits():
            yield
    except Reported:
        raise
    except (UserError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") and not isinstance(error, ConfigError):
            raise
        messages = error.messages if isinstance(error, ConfigError) else (str(error),)
        if sweep:
            raise JobFailed(messages) from None
        if silent:
            raise Reported(2) from None
        refuse(messages)
    except KeyboardInterrupt:
        _stopped(130)
    except SystemExit as error:
        # Lightning turns Ctrl-C into exit code 1 after its own clean-up; our callback leaves with 128 + the signal.
        if error.code in (130, 143) or isinstance(error.__context__, KeyboardInterrupt):
            _stopped(143 if error.code == 143 else 130, silent=type(error) is not SystemExit)
        raise


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM ends the process like an error does, with clean-up; callbacks/graceful_stop.py takes over in a fit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def refuse(messages: Sequence[str]) -> NoReturn:
    """Write the messages and end the process with exit code 2."""
    lines = [f"recondense: {messages[0]}"]
    if len(messages) > 1:
        lines = [f"recondense: {len(messages)} problems", *(f"{i:2}. {text}" for i, text in enumerate(messages, 1))]
    print("\n".join(lines), file=sys.stderr)
    raise Reported(2) from None


def _stopped(code: int, *, silent: bool = False) -> NoReturn:
    """End the process; `silent`: whoever stopped it has said so."""
    if not silent:
        what = "stopped by SIGTERM" if code == 143 else "interrupted"
        print(f"recondense: {what}. The same command resumes where this run stopped.", file=sys.stderr)
    raise Reported(code) from None
