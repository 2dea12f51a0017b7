"""Output that nobody can receive: a stream is closed, its disk is full, or its reader has left. The command goes on.

A run lasts longer than `head` or a terminal. Its results are written and uploaded all the same, and its exit code is
its own.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO

STREAMS = {"stdout": 1, "stderr": 2}  # their file descriptors


class _Dropping(io.FileIO):
    """A file descriptor that drops what cannot be written.

    Args:
        descriptor: the file descriptor.
        instead: file descriptor that receives what cannot be written, except if a reader left, who has seen enough.
    """

    def __init__(self, descriptor: int, instead: int | None = None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._instead = instead

    def write(self, data: Any) -> int:
        with suppress(BrokenPipeError):
            try:
                while (written := super().write(data)) is None:  # the stream does not block, and is full for now
                    select.select([], [self], [])
                return written
            except BrokenPipeError:
                raise
            except OSError:
                if self._instead is not None:
                    with suppress(OSError):
                        return os.write(self._instead, data)
        return memoryview(data).nbytes


@contextmanager
def survive_lost_output() -> Iterator[None]:
    """Inside, stdout and stderr drop what they cannot write, and replace characters that they cannot encode.

    What stdout cannot write goes to stderr, because it is the report; what a reader no longer wants is dropped.
    """
    _open_standard_descriptors()
    with ExitStack() as stack:
        for name, descriptor in STREAMS.items():
            stream = getattr(sys, name)
            if stream is None or _is_plain(stream):
                stack.enter_context(_dropping(name, stream, descriptor))
        yield


def _open_standard_descriptors() -> None:
    """Open the standard descriptors that are closed, because the next file that is opened would get their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) == number:  # the lowest number that is free
                os.set_inheritable(number, True)


@contextmanager
def _dropping(name: str, before: TextIO | None, descriptor: int) -> Iterator[None]:
    """Replace a stream of `sys`; one that is closed drops everything, or writes to stderr if it is stdout."""
    instead = STREAMS["stderr"] if name == "stdout" and sys.stderr is not None else None
    if before is None:
        raw: Any = _Dropping(descriptor if instead is None else instead)
        encoding = "utf-8" if instead is None else sys.stderr.encoding
        unbuffered = False
        options: dict[str, Any] = {"encoding": encoding, "errors": "replace", "line_buffering": True}
    else:
        with suppress(OSError):
            before.flush()
        raw, unbuffered = _Dropping(before.fileno(), instead), bool(before.write_through)  # type: ignore[attr-defined]
        errors = "replace" if before.errors == "strict" else before.errors
        options = {"encoding": before.encoding, "errors": errors, "line_buffering": before.line_buffering}
    buffer = raw if unbuffered else io.BufferedWriter(raw)
    stream = io.TextIOWrapper(buffer, write_through=unbuffered, **options)
    setattr(sys, name, stream)
    try:
        yield
    finally:
        stream.flush()
        if getattr(sys, name) is stream:
            setattr(sys, name, before)


def _is_plain(stream: Any) -> bool:
    """Return whether a stream writes text to a file descriptor; those of notebooks do not, and are not replaced."""
    try:
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() >= 0
    except (OSError, ValueError):  # it is no file, or closed
        return False
