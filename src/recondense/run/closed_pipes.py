"""Output into a pipe that its reader has closed, as in `recondense ... | head`: the command drops it and goes on."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO


class _Dropping(io.FileIO):
    """A file descriptor that drops what nobody can read any more."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


@contextmanager
def survive_closed_pipes() -> Iterator[None]:
    """Inside, stdout and stderr drop what they cannot write into a pipe because its reader is gone.

    A run lasts longer than `head`: its results are written and uploaded all the same, and its exit code is its own.
    """
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            if _is_pipe(getattr(sys, name)):
                stack.enter_context(_dropping(name))
        yield


@contextmanager
def _dropping(name: str) -> Iterator[None]:
    before: TextIO = getattr(sys, name)
    with suppress(BrokenPipeError):
        before.flush()
    raw: Any = _Dropping(before.fileno(), "w", closefd=False)
    unbuffered: bool = before.write_through  # type: ignore[attr-defined]
    buffer = raw if unbuffered else io.BufferedWriter(raw)
    options: Any = {"line_buffering": before.line_buffering, "write_through": unbuffered}
    stream = io.TextIOWrapper(buffer, before.encoding, before.errors, **options)
    setattr(sys, name, stream)
    try:
        yield
    finally:
        stream.flush()
        if getattr(sys, name) is stream:
            setattr(sys, name, before)


def _is_pipe(stream: Any) -> bool:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # there is none, or it is no file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
