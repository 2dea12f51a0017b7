"""Write files under a temporary name and rename them; file names, locks and folders that runs share.

A killed process leaves the old file or the new one, never a partial one. JSON files that only recondense writes have a
checksum, because disks, copies and editors damage files too. Importing this module needs only the standard library.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recondense.errors import UserError
from recondense.full_disk import explain_writing

LONGEST_KEY = 120  # some file systems allow 143 bytes; the suffix and the temporary name take 23 of them
# Lower case, because some file systems ignore case; no device names of Windows.
PLAIN_KEY = re.compile(rf"(?!(con|prn|aux|nul|com\d|lpt\d)\Z)[a-z0-9][a-z0-9_-]{{0,{LONGEST_KEY - 1}}}")
MARK = "+"  # precedes the fingerprint in a name; no plain key contains it
PARTIAL = ".partial"
PROBE = 4096  # bytes that a folder must have room for
HASH_BYTES = 1 << 24  # read at once
CHECKSUM = "sha256"  # entry of a JSON file

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
    encoded = content.encode("utf-8") if isinstance(content, str) else content
    with replace_file(path, len(encoded)) as aside:
        aside.write_bytes(encoded)


def append(path: Path, text: str) -> None:
    """Append text to a file that exists, all of it or nothing."""
    content = text.encode("utf-8")
    with explain_writing(path, len(content)), path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(size)
            raise


@contextmanager
def replace_file(path: Path, needs: int | None = None) -> Iterator[Path]:
    """Replace a file: the caller writes a temporary file, which is synced at the end and renamed to `path`.

    After an error the old file is unchanged and the temporary file is removed. Several processes may write the same
    path.

    Args:
        path: the file; its folder is created if it does not exist.
        needs: the bytes that are written, if they are known.

    Yields:
        the path of the temporary file.

    Raises:
        DiskFull: there is no room for the file.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    with explain_writing(path, needs):
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _create(aside)
        try:
            yield aside
            _sync(aside, mode)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


@contextmanager
def replace_folder(folder: Path, needs: int | None = None) -> Iterator[Path]:
    """Replace a folder: the caller fills a temporary one, which is synced at the end and renamed to `folder`.

    After an error the old folder is unchanged and the temporary one is removed. No other process may write the same
    folder.

    Args:
        folder: the folder.
        needs: about how many bytes are written, if that is known.

    Yields:
        the temporary folder.

    Raises:
        DiskFull: there is no room for the folder.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}{PARTIAL}")
    with explain_writing(folder, needs):
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


def probe_folder(folder: Path) -> None:
    """Write a small file into a folder, and remove it.

    Raises:
        OSError: this is not possible.
    """
    path = folder / f".{secrets.token_hex(4)}{PARTIAL}"
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())  # some file systems notice only now that they are full
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


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
    """Hold a lock file in the cache. While another process holds it, log a line and wait.

    Where no lock can be made, as in a cache that may only be read, a line says so, and the code inside runs without it:
    two processes may then do the same work.

    Args:
        path: the lock file; its folder is created if it does not exist.
        doing: what the other process is doing, for the log: a verb and its object.
    """
    from filelock import FileLock, Timeout  # here, so that plans are read and written without any library

    lock = FileLock(path)
    try:
        with explain_writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting: another process %s (%s)", doing, path)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter on file systems without locks
        log.warning("%s: there is no lock (%s), so another process may do the same work", path, error)
    try:
        yield
    finally:
        lock.release()


class Damaged(UserError):
    """A file of recondense is not as it was written. The message says what is wrong, without the path."""


def write_checked(path: Path, value: Mapping[str, Any], indent: int | None = None) -> None:
    """Write an object as JSON, with a checksum of its other entries under `CHECKSUM`.

    Raises:
        ValueError: a number is not finite.
    """
    checksum = fingerprint(json.loads(json.dumps(value, allow_nan=False)))
    write_aside(path, json.dumps({**value, CHECKSUM: checksum}, allow_nan=False, indent=indent) + "\n")


def read_checked(path: Path) -> dict[str, Any]:
    """Read an object that `write_checked` has written, without its checksum.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: it cannot be read, or is not what was written.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"it cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise Damaged("it is not valid JSON") from None
    if not isinstance(value, dict) or value.pop(CHECKSUM, None) != fingerprint(value):
        raise Damaged("its checksum is missing or wrong")
    return value


def hash_file(path: Path) -> str:
    """Return a hash (32 hexadecimal digits) of a file's content."""
    import xxhash  # here, as above: it is ten times as fast as sha256

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def discard(path: Path) -> None:
    """Remove whatever has a path: a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class JsonFolder(MutableMapping[str, dict[str, Any]]):
    """A folder as a mapping from keys to JSON objects. Concurrent runs can share it.

    The file of a key is named by `file_name`. If the name differs from the key, the file contains
    {"key": ..., "value": ...}.

    Args:
        folder: the folder.
        remedy: what a user can do about a damaged file, for the error that it leads to. None for a cache: a damaged
            file then counts as missing, with a warning, and entries that cannot be written are kept in memory.
    """

    def __init__(self, folder: Path, remedy: str | None = None) -> None:
        self.folder = folder
        self.remedy = remedy
        self._unwritten: dict[str, dict[str, Any]] = {}

    def __getitem__(self, key: str) -> dict[str, Any]:
        if key in self._unwritten:
            return self._unwritten[key]
        path = self._path(key)
        try:
            content = read_checked(path)
            if MARK not in file_name(key):
                return content
            if content.get("key") != key or not isinstance(content.get("value"), dict):
                raise Damaged("it belongs to another key")
            return content["value"]
        except FileNotFoundError:
            raise KeyError(key) from None
        except Damaged as error:
            if self.remedy is not None:
                raise UserError(f"{path} is damaged: {error}. {self.remedy}") from None
            log.warning("%s is damaged (%s) and is made again", path, error)
            raise KeyError(key) from None

    def __setitem__(self, key: str, value: dict[str, Any]) -> None:
        path = self._path(key)
        try:
            if self.remedy is None and path.is_dir():
                discard(path)
            write_checked(path, {"key": key, "value": value} if MARK in file_name(key) else value)
        except OSError as error:
            if self.remedy is not None:
                raise
            log.warning("the cache cannot be written (%s), so this result is not kept for other runs", error)
            self._unwritten[key] = value

    def __delitem__(self, key: str) -> None:
        try:
            self._path(key).unlink()
        except FileNotFoundError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        for path in sorted(self.folder.glob("*.json")):
            if not path.name.startswith("."):
                try:
                    yield read_checked(path)["key"] if MARK in path.stem else path.stem
                except Damaged as error:
                    raise UserError(f"{path} is damaged: {error}. {self.remedy or 'Delete it'}") from None

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, key: str) -> Path:
        return self.folder / f"{file_name(key)}.json"
