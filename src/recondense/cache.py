"""Searched orders on disk: a mapping of JSON files that concurrent runs share safely."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from recondense.plan import write_aside


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits of the sha256 of some JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


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
