"""Where texts come from: Python's standard library, local files, or a dataset of the Hugging Face hub.

A corpus is a list of documents per split. No document is in two splits. This file needs no torch, so that a config can
be checked before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path

from recondense.config import CalibrationConfig, DataConfig
from recondense.errors import UserError
from recondense.hub import hub_corpora
from recondense.mixing import check_sources, mixed
from recondense.textfiles import read_texts

SPLITS = ("train", "validation", "calibration")

# Not prose in Python: tests, generated tables, installed packages.
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
# A calibration document: longer than 256 tokens of most tokenizers, so that cutting it at max_length leaves full texts.
CHUNK_CHARACTERS = 2000


@dataclass(frozen=True)
class Corpora:
    """Documents of each split, texts or `Record`s; None where a split is not configured or was not asked for."""

    train: list[str] | None = None
    validation: list[str] | None = None
    calibration: list[str] | None = None

    def sha256(self) -> dict[str, str]:
        """The hash of every split's documents, in their order; absent splits are left out."""
        return {split: _digest(texts) for split in SPLITS if (texts := getattr(self, split)) is not None}


def load_corpora(data: DataConfig, splits: Iterable[str] = SPLITS) -> Corpora:
    """Read the splits that are both asked for and configured.

    The training documents leave out the calibration set's, wherever it comes from: a model is not to be trained on what
    its search has seen. Validation documents that a calibration source holds too stay: validation texts are measured as
    they were given, and training leaves them out as well. `num_texts` counts the documents that are left.

    Args:
        data: what to read.
        splits: which splits; a split that is not asked for is not read, so nothing is downloaded for it.

    Returns:
        Corpora: of `calibration`, the first `data.calibration.num_samples` documents count.

    Raises:
        UserError: a file, split or field that is missing, empty or unreadable, with the remedy.
        UserError: the hub cannot be reached.
    """
    wanted = set(splits)
    if data.calibration.sources is not None and wanted & {"calibration", "train"}:
        return _with_sources(data, wanted)
    return _load(data, wanted)


def _with_sources(data: DataConfig, wanted: set[str]) -> Corpora:
    """The calibration set is mixed from its sources; the other splits are the data's own."""
    calibration = mixed(data, load_corpora)
    own = replace(data, calibration=CalibrationConfig(), splits=replace(data.splits, calibration=None))
    found = _load(own, wanted - {"calibration"}, apart=calibration)
    return replace(found, calibration=calibration if "calibration" in wanted else None)


def _load(data: DataConfig, wanted: set[str], apart: Sequence[str] = ()) -> Corpora:
    """Read splits of the data's own source; `apart`: documents that may not train."""
    if data.source == "stdlib":
        corpora = stdlib_corpora()
        taken = set(apart)
        corpora = replace(corpora, train=[text for text in corpora.train or [] if text not in taken])
        limits = {"train": data.train.num_texts, "validation": data.validation.num_texts, "calibration": None}
        return Corpora(**{split: getattr(corpora, split)[: limits[split]] for split in SPLITS if split in wanted})
    if data.source == "texts":
        return _text_corpora(data, wanted, apart)
    return Corpora(**hub_corpora(data, wanted, apart))


def check_paths(data: DataConfig) -> list[str]:
    """Every problem of the configured text sources that shows without a model, as sentences with their remedy."""
    problems = list(check_sources(data))
    if data.source == "texts":
        problems += [problem for split in SPLITS for problem in _check_file(data, split)]
    if data.source == "hub":
        problems += _check_hub(data)
    return problems


# ---------------------------------------------------------------------------------------------- standard library


def stdlib_corpora() -> Corpora:
    """The running interpreter's standard library: a document is a module, split by a hash of its dotted name.

    About 90% of the modules train, 5% validate, 5% calibrate, on every machine the same ones. Calibration modules are
    cut into pieces of some 2,000 characters, taken in turns (every module's first piece, then every module's second
    piece, ...), because there are fewer of them than a calibration set needs.

    Raises:
        UserError: the interpreter's library has no readable sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, text in sorted(_modules(root)):
        splits[_split_of(name)].append(text)
    splits["calibration"] = _take_turns([_pieces(text) for text in splits["calibration"]])
    if not all(splits.values()):
        sizes = ", ".join(f"{split} {len(texts)}" for split, texts in splits.items())
        raise UserError(
            f"data=stdlib: {root} has too few Python sources ({sizes}); use an interpreter that ships its library's "
            "sources, or data=texts with files of your own."
        )
    return Corpora(**splits)


def _modules(root: Path) -> Iterator[tuple[str, str]]:
    """(dotted name, source) of every module below `root`."""
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
    """Whether a file or folder tells how this interpreter was built; it differs between machines."""
    return name.startswith(("_sysconfigdata", "config-"))


def _split_of(name: str) -> str:
    """The split of a module: a pure function of its dotted name."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20
    return {0: "validation", 1: "calibration"}.get(bucket, "train")


def _pieces(text: str) -> list[str]:
    """Cut a text at line ends into pieces of CHUNK_CHARACTERS or more; a shorter rest is left out unless it is all."""
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


# --------------------------------------------------------------------------------------------------- local files


def _text_corpora(data: DataConfig, wanted: set[str], apart: Sequence[str]) -> Corpora:
    found: dict[str, list[str] | None] = dict.fromkeys(SPLITS)
    for split in SPLITS:
        needed = split in wanted or "train" in wanted  # which leaves out the others' texts
        if needed and getattr(data, split).path is not None:
            found[split] = _read_split(data, split)
    if found["validation"] is not None:
        found["validation"] = found["validation"][: data.validation.num_texts]
    if found["train"] is not None:
        calibration = (found["calibration"] or [])[: data.calibration.num_samples]
        taken = {*calibration, *(found["validation"] or []), *apart}
        found["train"] = [text for text in found["train"] if text not in taken][: data.train.num_texts]
        if not found["train"]:
            raise UserError(
                f"data.train.path={data.train.path}: all of its texts are calibration or validation "
                "texts; give another file."
            )
    return Corpora(**{split: found[split] if split in wanted else None for split in SPLITS})


def _read_split(data: DataConfig, split: str) -> list[str]:
    """All documents of a split's file; empty ones stay in the calibration set alone, where they are an error."""
    given = getattr(data, split).path
    try:
        texts = [text for _, text in read_texts(Path(given).expanduser(), data.text_field, data.form)]
    except UserError as error:
        raise UserError(f"data.{split}.path={given}: {error}") from None
    if split != "calibration":
        texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"data.{split}.path={given}: the file has no text; give one with at least one document.")
    return texts


def _check_file(data: DataConfig, split: str) -> Iterator[str]:
    given = getattr(data, split).path
    if given is None:
        return
    path, where = Path(given).expanduser(), f"data.{split}.path={given}"
    if not path.is_file():
        yield f"{where}: {'is a folder; a file is needed' if path.is_dir() else 'there is no such file'}."
        return
    # The calibration file is read whole, it decides the search; of the others the first document must be readable.
    try:
        found = list(islice(read_texts(path, data.text_field, data.form), None if split == "calibration" else 1))
    except UserError as error:
        yield f"{where}: {error}"
        return
    if not found:
        yield f"{where}: the file is empty; it must hold texts."
    elif split == "calibration":
        yield from _check_calibration(where, found, data.calibration.num_samples)


def _check_calibration(where: str, found: list[tuple[int, str]], num_samples: int) -> Iterator[str]:
    if len(found) < num_samples:
        yield (
            f"{where}: has {len(found)} texts, but data.calibration.num_samples={num_samples}; lower num_samples or "
            "give more texts."
        )
    for number, text in found[:num_samples]:
        if not text:
            yield f"{where}: line {number} is an empty text, shorter than one token; remove it."


def _check_hub(data: DataConfig) -> list[str]:
    if not data.dataset:
        return [f"data.dataset is null, but data={data.name} comes from the hub: name the data set (owner/name)."]
    return [
        f"data.{split}.num_texts is null, but data.streaming=true would read the whole split; set a number of texts."
        for split in ("train", "validation")
        if data.streaming and getattr(data.splits, split) and getattr(data, split).num_texts is None
    ]


def _digest(texts: Sequence[str]) -> str:
    sha256 = hashlib.sha256()
    for text in texts:
        raw = text.encode("utf-8", errors="surrogatepass")
        sha256.update(len(raw).to_bytes(8, "big") + raw)
    return sha256.hexdigest()
