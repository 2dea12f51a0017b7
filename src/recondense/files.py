"""Files that are written under another name and then renamed; file names, locks and folders that runs share.

A kill leaves the old file or the new one, never half of one. Importing this module needs the standard library alone.
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

LONGEST_KEY = 120  # some file systems end at 143 bytes, of which a suffix and a name for writing need 23
# Lower case, because some file systems do not tell case apart; no names of devices of Windows.
PLAIN_KEY = re.compile(rf"(?!(con|prn|aux|nul|com\d|lpt\d)\Z)[a-z0-9][a-z0-9_-]{{0,{LONGEST_KEY - 1}}}")
MARK = "+"  # before the fingerprint in a name; no plain key has it
PARTIAL = ".partial"

log = logging.getLogger(__name__)


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits of the sha256 of some JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def file_name(key: str) -> str:
    """A name without suffix that every file system takes; different keys have different names.

    A short key of lower-case letters, digits, - and _ is its own name. Any other key's name begins like the key and
    ends in a fingerprint.
    """
    if PLAIN_KEY.fullmatch(key):
        return key
    start = re.sub(r"[^a-z0-9_]+", "-", key[: LONGEST_KEY // 2].lower()).strip("-")
    return f"{start}{MARK}{fingerprint(key)}"


def write_aside(path: Path, content: str | bytes) -> None:
    """Write all of a file at once with `replace_file`; text as UTF-8."""
    with replace_file(path) as aside:
        aside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Replace a file: the caller writes another file, which is synced at the end and takes the place of `path`.

    An error leaves the old file as it was, and nothing beside it. Several processes may write the same path.

    Args:
        path: the file; its folder is made if it does not exist.

    Yields:
        the path to write.
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
    """Replace a folder: the caller fills another one, which is synced at the end and takes the place of `folder`.

    An error leaves the old folder as it was, and nothing beside it. No other process may write the same folder.

    Yields:
        the folder to fill.
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
    """Remove the half-written files of killed processes from a folder that no other process writes now."""
    for path in Path(folder).glob(f".*{PARTIAL}"):
        if path.is_file():
            path.unlink(missing_ok=True)


def _exchange(aside: Path, folder: Path) -> None:
    """Rename `aside` to `folder` and remove the old one, which a rename cannot replace unless it is empty."""
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
    """Make an empty file and return its mode, which shows the umask: reading that would set it for all threads."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)


def _sync(path: Path, mode: int) -> None:
    """Wait until a file is on the disk, and set its mode: safetensors makes files that only their owner may read."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if os.fstat(file.fileno()).st_mode & 0o777 != mode:
            os.chmod(path, mode)


@contextmanager
def hold_lock(path: Path, doing: str) -> Iterator[None]:
    """Hold a lock file; wait while another process holds it, and log that.

    Args:
        doing: what the other process does, for the log: a verb and its object.
    """
    from filelock import FileLock, Timeout  # here: a plan is read and written without any library

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
    """A folder as a mapping from keys to JSON objects; concurrent runs share it safely.

    A file is named by `file_name`. If that is not the key itself, the file holds {"key": ..., "value": ...}.
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
