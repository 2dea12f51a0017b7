"""Reads the splits of a run: from Python's standard library, local files, or a dataset of the hub.

No document is in two splits. Needs no torch, so that a config can be checked before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from recondense.config.schema import CalibrationConfig, DataConfig
from recondense.data.corpus import SPLITS, Corpora
from recondense.data.hub import hub_corpora
from recondense.data.mixture import check_sources, mixed
from recondense.data.stdlib import stdlib_corpora
from recondense.data.text_files import read_texts
from recondense.errors import UserError


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
