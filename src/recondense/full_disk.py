"""Errors of a disk that has no room, however a library words them, as errors that the user can fix.

Importing this module needs only the standard library.
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from recondense.errors import UserError

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this system allows (see ulimit -f)",
}
# How libraries word it that raise no OSError: safetensors, tokenizers, Arrow, SQLite, torch.save.
WORDS = {
    errno.ENOSPC: r"\[errno 28\]|os error 28\b|no space left on device|database or disk is full",
    errno.EDQUOT: r"\[errno 122\]|os error 122\b|disk quota exceeded",
    errno.EFBIG: r"\[errno 27\]|os error 27\b|file too large",
}
SAME_COMMAND = "the same command then goes on where it stopped"

log = logging.getLogger(__name__)


class DiskFull(UserError):
    """A file cannot be written because there is no room for it."""


def lacks_room(error: BaseException | None) -> str | None:
    """Return why there is no room, if that is what an error or what led to it says; None for any other error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in REASONS:
            return REASONS[error.errno]
        text = str(error).lower()
        for number, words in WORDS.items():
            if re.search(words, text):
                return REASONS[number]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def free_bytes(path: Path) -> int | None:
    """Return the free bytes of the file system of a path, which need not exist; None if they cannot be known."""
    for place in (path.absolute(), *path.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def format_bytes(size: float) -> str:
    """Return a size in decimal units with three digits: 1234567 becomes "1.23 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:#.3g} {unit}".replace(". ", " ")
        size /= 1000
    raise AssertionError("unreachable")


def warn_of_little_room(path: Path, needs: int, what: str) -> None:
    """Log a warning if something that is written later needs more room than there is now."""
    free = free_bytes(path)
    if free is not None and free < needs:
        log.warning(
            "%s: %s needs about %s, and only %s are free; make room before it is written",
            *(path, what, format_bytes(needs), format_bytes(free)),
        )


def explain_writing(path: Path, needs: int | None = None) -> AbstractContextManager[None]:
    """Turn an error for want of room into a `DiskFull` that names what is written inside the context.

    Args:
        path: the file or folder.
        needs: the bytes that it needs, if they are known.
    """

    def describe(error: Exception, reason: str) -> str:
        free = free_bytes(path)
        sizes = [] if needs is None else [f"it needs {format_bytes(needs)}"]
        sizes += [] if free is None else [f"{format_bytes(free)} are free"]
        shown = f" ({', '.join(sizes)})" if sizes else ""
        return f"{path} cannot be written: {reason}{shown}. Make room there; {SAME_COMMAND}"

    return _explain(describe)


def explain_full_disks(places: Mapping[str, Path]) -> AbstractContextManager[None]:
    """Turn an error for want of room that names no file into a `DiskFull` with the free bytes of some folders.

    Args:
        places: the folders to which the code inside writes, besides that of temporary files, by a setting or name.
    """

    def describe(error: Exception, reason: str) -> str:
        folders = {**places, "temporary files": Path(tempfile.gettempdir())}
        free = [(f"{name} ({path})", free_bytes(path)) for name, path in folders.items()]
        shown = [f"{name}: {format_bytes(size)}" for name, size in free if size is not None]
        file = getattr(error, "filename", None)
        subject = f"{file} cannot be written" if file else "writing failed"
        return f"{subject}: {reason}. Free are {', '.join(shown)}. Make room; {SAME_COMMAND}"

    return _explain(describe)


@contextmanager
def _explain(describe: Callable[[Exception, str], str]) -> Iterator[None]:
    """Turn an error for want of room inside the context into a `DiskFull`.

    Args:
        describe: returns the message for an error and its reason.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if (reason := lacks_room(error)) is None:
            raise
        raise DiskFull(describe(error, reason)) from error
