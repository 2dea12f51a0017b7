"""Use Python's standard library as a corpus, for runs that download nothing."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from recondense.data.corpus import SPLITS, Corpora
from recondense.errors import UserError

# Tests, generated tables and installed packages, which are not typical Python text.
EXCLUDED_FOLDERS = frozenset(
    [
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    ]
)
# The length of a calibration document: more than 256 tokens of most tokenizers, so that truncated texts are full.
CHUNK_CHARACTERS = 2000


def stdlib_corpora() -> Corpora:
    """Return the running interpreter's standard library. A document is a module.

    A hash of the module's dotted name decides its split: about 90% of the modules are for training, 5% for validation
    and 5% for calibration, the same ones on every machine. A calibration set needs more texts than there are modules
    for it, so these are cut into pieces of about 2,000 characters: first every module's first piece, then every
    module's second piece, and so on.

    Raises:
        UserError: a split is empty, because the interpreter's library has too few readable sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, text in sorted(_modules(root)):
        splits[_split_of(name)].append(text)
    splits["calibration"] = _take_turns([_pieces(text) for text in splits["calibration"]])
    if not all(splits.values()):
        sizes = ", ".join(f"{split} {len(texts)}" for split, texts in splits.items())
        raise UserError(
            f"data=stdlib: {root} has too few Python sources ({sizes}); use an interpreter that comes with the sources "
            "of its library, or data=texts with your own files."
        )
    return Corpora(**splits)


def _modules(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, source) of every module below `root`."""
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in EXCLUDED_FOLDERS and not _is_configuration(name)]
        for file in files:
            if not file.endswith(".py") or _is_configuration(file):
                continue
            path = Path(folder, file)
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip():
                yield ".".join(path.relative_to(root).with_suffix("").parts), text


def _is_configuration(name: str) -> bool:
    """Return whether a file or folder describes this build of the interpreter, and so differs between machines."""
    return name.startswith(("_sysconfigdata", "config-"))


def _split_of(name: str) -> str:
    """Return the split of a module; it depends only on the dotted name."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20
    return {0: "validation", 1: "calibration"}.get(bucket, "train")


def _pieces(text: str) -> list[str]:
    """Cut a text at line ends into pieces of at least CHUNK_CHARACTERS; drop a shorter rest, except of a short text."""
    pieces, lines, size = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= CHUNK_CHARACTERS:
            pieces.append("".join(lines))
            lines, size = [], 0
    return pieces or [text]


def _take_turns(groups: Sequence[Sequence[str]]) -> list[str]:
    return [text for turn in zip_longest(*groups) for text in turn if text is not None]
