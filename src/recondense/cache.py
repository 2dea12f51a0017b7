"""Searched orders on disk: a mapping of JSON files that concurrent runs share safely."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from recondense.plan import write_aside

log = logging.getLogger(__name__)


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits of the sha256 of some JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def waiting_lock(path: Path, doing: str) -> Iterator[None]:
    """Hold a lock file; say so when another process has it."""
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
    """A folder as a mapping from names to JSON objects; each entry is written aside, then renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, key: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]
        except FileNotFoundError:
            raise KeyError(key) from None

    def __setitem__(self, key: str, value: dict[str, Any]) -> None:
        write_aside(self.folder / f"{key}.json", json.dumps(value, allow_nan=False) + "\n")

    def __delitem__(self, key: str) -> None:
        try:
            (self.folder / f"{key}.json").unlink()
        except FileNotFoundError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.stem for path in self.folder.glob("*.json") if not path.name.startswith(".")))

    def __len__(self) -> int:
        return sum(1 for _ in self)
