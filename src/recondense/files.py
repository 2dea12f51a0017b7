"""Write files under a temporary name and rename them; file names, locks and folders that runs share.

A killed process leaves the old file or the new one, never a partial one. Importing this module needs only the standard
library.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONGEST_KEY = 120  # some file systems allow 143 bytes; the suffix and the temporary name take 23 of them
# Lower case, because some file systems ignore case; no device names of Windows.
PLAIN_KEY = re.compile(rf"(?!(con|prn|aux|nul|com\d|lpt\d)\Z)[a-z0-9][a-z0-9_-]{{0,{LONGEST_KEY - 1}}}")
MARK = "+"  # precedes the fingerprint in a name; no plain key contains it
PARTIAL = ".partial"

log = logging.getLogger(__name__)


def fingerprint(*parts: Any) -> str:
    """Return sixteen hexadecimal digits of the sha256 of some JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def file_name(key: str) -> str:
    """Return a name without suffix that every file system accepts; different keys have different names.

    A short key of lower-case letters, digits, - and _ is used unchanged. For any other key, the name begins like the
    key and ends in a fingerprint.
    """
    if PLAIN_KEY.fullmatch(key):
        return key
    start = re.sub(r"[^a-z0-9_]+", "-", key[: LONGEST_KEY // 2].lower()).strip("-")
    return f"{start}{MARK}{fingerprint(key)}"


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a complete file with `replace_file`; text is encoded as UTF-8."""
    with replace_file(path) as aside:
        aside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Replace a file: the caller writes a temporary file, which is synced at the end and renamed to `path`.

    After an error the old file is unchanged and the temporary file is removed. Several processes may write the same
    path.

    Args:
        path: the file; its folder is created if it does not exist.

    Yields:
        the path of the temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    mode = _create(aside)
    try:
        yield aside
        _sync(aside, mode)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Replace a folder: the caller fills a temporary one, which is synced at the end and renamed to `folder`.

    After an error the old folder is unchanged and the temporary one is removed. No other process may write the same
    folder.

    Yields:
        the temporary folder.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}{PARTIAL}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        probe = aside / f".mode{PARTIAL}"
        mode = _create(probe)
        probe.unlink()
        for path in aside.rglob("*"):
            if path.is_file():
                _sync(path, mode)
        _exchange(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def remove_partial(folder: Path) -> None:
    """Remove the partial files of killed processes from a folder. No other process may be writing to it."""
    for path in Path(folder).glob(f".*{PARTIAL}"):
        if path.is_file():
            path.unlink(missing_ok=True)


def _exchange(aside: Path, folder: Path) -> None:
    """Rename `aside` to `folder`. The old folder is moved away first: a rename replaces only an empty folder."""
    before = folder.with_name(f".{folder.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        os.replace(folder, before)
    try:
        os.replace(aside, folder)
    except BaseException:
        if before.exists():
            before.rename(folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _create(path: Path) -> int:
    """Create an empty file and return its mode, which shows the umask; `os.umask` would change it for all threads."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)


def _sync(path: Path, mode: int) -> None:
    """Flush a file to the disk and set its mode: safetensors creates files that only their owner may read."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if os.fstat(file.fileno()).st_mode & 0o777 != mode:
            os.chmod(path, mode)


@contextmanager
def hold_lock(path: Path, doing: str) -> Iterator[None]:
    """Hold a lock file. While another process holds it, log a line and wait.

    Args:
        path: the lock file.
        doing: what the other process is doing, for the log: a verb and its object.
    """
    from filelock import FileLock, Timeout  # here, so that plans are read and written without any library

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting: another process %s (%s)", doing, path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class JsonFolder(MutableMapping[str, dict[str, Any]]):
    """A folder as a mapping from keys to JSON objects. Concurrent runs can share it.

    The file of a key is named by `file_name`. If the name differs from the key, the file contains
    {"key": ..., "value": ...}.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, key: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(self._path(key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise KeyError(key) from None
        return content["value"] if MARK in file_name(key) else content

    def __setitem__(self, key: str, value: dict[str, Any]) -> None:
        content = {"key": key, "value": value} if MARK in file_name(key) else value
        write_aside(self._path(key), json.dumps(content, allow_nan=False) + "\n")

    def __delitem__(self, key: str) -> None:
        try:
            self._path(key).unlink()
        except FileNotFoundError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        for path in sorted(self.folder.glob("*.json")):
            if not path.name.startswith("."):
                yield json.loads(path.read_text(encoding="utf-8"))["key"] if MARK in path.stem else path.stem

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, key: str) -> Path:
        return self.folder / f"{file_name(key)}.json"
