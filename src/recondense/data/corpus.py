"""The documents of each split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

SPLITS = ("train", "validation", "calibration")


@dataclass(frozen=True)
class Corpora:
    """The documents of each split, texts or `Record`s. A split that is not configured or was not requested is None."""

    train: list[str] | None = None
    validation: list[str] | None = None
    calibration: list[str] | None = None

    def sha256(self) -> dict[str, str]:
        """Return the SHA-256 of each split's documents, in order; absent splits are left out."""
        return {split: _digest(texts) for split in SPLITS if (texts := getattr(self, split)) is not None}


def _digest(texts: Sequence[str]) -> str:
    sha256 = hashlib.sha256()
    for text in texts:
        raw = text.encode("utf-8", errors="surrogatepass")
        sha256.update(len(raw).to_bytes(8, "big") + raw)
    return sha256.hexdigest()
