"""Exit codes of the command, and messages without a traceback for errors that the user can fix."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from recondense.errors import ConfigError, UserError


class Reported(SystemExit):
    """End of the process after its reason has been printed."""


class JobFailed(Exception):
    """An error of one job of a sweep that the user can fix; callbacks/sweep.py lets the other jobs continue."""

    def __init__(self, messages: Sequence[str]) -> None:
        self.messages = tuple(messages)
        super().__init__(" ".join(self.messages))


def another_says_it() -> bool:
    """Return whether torchrun or srun started the same command in another process of this machine, which reports too.

    A process that a run started is alone in what it finds: its run was checked before.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ.get("LOCAL_RANK") or 0) > 0
    return "RANK" not in os.environ and int(os.environ.get("SLURM_LOCALID") or 0) > 0


@contextmanager
def exit_codes(*, sweep: bool = False, silent: bool = False) -> Iterator[None]:
    """End the process with the exit code of an error that the code inside raises.

    The exit code is 2, with only a message, for errors that the user can fix (`UserError`, `OSError`), 130 for Ctrl-C,
    and 143 for SIGTERM. Other errors keep their traceback.

    Args:
        sweep: whether the code is a job of a sweep. If so, errors that the user can fix are raised as `JobFailed`.
        silent: whether to omit the message, because another process prints the same one.
    """
    try:
        with _sigterm_exits():
            yield
    except Reported:
        raise
    except (UserError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") and not isinstance(error, ConfigError):
            raise
        messages = _sentences(error)
        if sweep:
            raise JobFailed(messages) from None
        if silent:
            raise Reported(2) from None
        refuse(messages)
    except KeyboardInterrupt:
        _stopped(130)
    except SystemExit as error:
        # Lightning turns Ctrl-C into exit code 1 after its clean-up; graceful_stop.py exits with 128 + the signal.
        if error.code in (130, 143) or isinstance(error.__context__, KeyboardInterrupt):
            _stopped(143 if error.code == 143 else 130, silent=type(error) is not SystemExit)
        raise


def _sentences(error: UserError | OSError) -> tuple[str, ...]:
    """Return what an error says; for an error of the system also the file, and that nothing that was done is lost."""
    if isinstance(error, ConfigError):
        return error.messages
    if isinstance(error, UserError) or not error.strerror:
        return (str(error),)
    names = " -> ".join(os.fspath(name) for name in (error.filename, error.filename2) if isinstance(name, str | Path))
    where = f"{names}: " if names else ""
    return (f"{where}{error.strerror}. The same command goes on from here once this is mended.",)


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Let SIGTERM end the process with clean-up, like an error. In a fit, callbacks/graceful_stop.py handles it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def refuse(messages: Sequence[str]) -> NoReturn:
    """Print the messages and end the process with exit code 2."""
    lines = [f"recondense: {messages[0]}"]
    if len(messages) > 1:
        lines = [f"recondense: {len(messages)} problems", *(f"{i:2}. {text}" for i, text in enumerate(messages, 1))]
    print("\n".join(lines), file=sys.stderr)
    raise Reported(2) from None


def _stopped(code: int, *, silent: bool = False) -> NoReturn:
    """End the process, with a message unless `silent`."""
    if not silent:
        reason = "stopped by SIGTERM" if code == 143 else "interrupted"
        print(f"recondense: {reason}. The same command resumes where this run stopped.", file=sys.stderr)
    raise Reported(code) from None
