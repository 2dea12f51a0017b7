"""Read the splits of a run from Python's standard library, local files, or a dataset on the hub.

No training document is in another split. This module does not import torch, so a config is checked before anything
slow is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from recondense.config.problems import Problem
from recondense.config.schema import CalibrationConfig, DataConfig
from recondense.data.calibration_mixture import check_sources, mix_sources
from recondense.data.corpus import SPLITS, Corpora
from recondense.data.hub import hub_corpora
from recondense.data.stdlib import stdlib_corpora
from recondense.data.text_files import TextFile
from recondense.data.valid_text import is_empty
from recondense.errors import UserError


def load_corpora(data: DataConfig, splits: Iterable[str] = SPLITS, where: str = "data") -> Corpora:
    """Read the requested splits that are configured.

    Documents of the calibration and validation sets are removed from the training documents: a model must not be
    trained on the texts of its search or its evaluation. Validation documents that are also in a calibration source are
    kept. `num_texts` limits the number of documents that remain.

    Args:
        data: the settings of the data.
        splits: the splits to read. Nothing is downloaded for other splits.
        where: the dotted name of `data` in the config, for messages.

    Returns:
        The documents of each split. Of `calibration`, only the first `data.calibration.num_samples` are used.

    Raises:
        UserError: a file, split or field is missing, empty or unreadable, or the hub cannot be reached.
    """
    names = set(splits)
    if data.calibration.sources is None or not names & {"calibration", "train"}:
        return _load(data, names, (), where)
    calibration = mix_sources(data)
    data = replace(data, calibration=CalibrationConfig(), splits=replace(data.splits, calibration=None))
    corpora = _load(data, names - {"calibration"}, calibration, where)
    return replace(corpora, calibration=calibration if "calibration" in names else None)


def _load(data: DataConfig, splits: set[str], excluded: Sequence[str], where: str) -> Corpora:
    """Read splits from the source that `data` names, without the `excluded` documents in the training texts."""
    if data.source == "stdlib":
        corpora = stdlib_corpora()
        used = set(excluded)
        corpora = replace(corpora, train=[text for text in corpora.train or [] if text not in used])
        limits = {"train": data.train.num_texts, "validation": data.validation.num_texts, "calibration": None}
        return Corpora(**{split: getattr(corpora, split)[: limits[split]] for split in SPLITS if split in splits})
    if data.source == "texts":
        return _load_files(data, splits, excluded, where)
    return Corpora(**hub_corpora(data, splits, excluded, where))


def check_paths(data: DataConfig, where: str = "data") -> Iterator[Problem]:
    """Yield the problems of the configured text sources that show without a model.

    Args:
        data: the settings of the data.
        where: the dotted name of `data` in the config, for messages.
    """
    yield from check_sources(data)
    if data.source == "texts":
        for split in SPLITS:
            yield from _check_file(data, split, where)
    if data.source == "hub":
        yield from _check_hub(data, where)


def _file_of(data: DataConfig, split: str, where: str) -> TextFile | None:
    """Return the file of a split; None if the config names no file."""
    path = getattr(data, split).path
    if path is None:
        return None
    group = "data" if split == "calibration" else where  # recovery stages have no calibration set
    return TextFile(path, data.text_field, data.form, where=where, setting=f"{group}.{split}.path")


def _load_files(data: DataConfig, splits: set[str], excluded: Sequence[str], where: str) -> Corpora:
    texts: dict[str, list[str] | None] = dict.fromkeys(SPLITS)
    for split in SPLITS:
        needed = split in splits or "train" in splits  # training excludes the texts of the other splits
        file = _file_of(data, split, where) if needed else None
        if file is not None:
            # The calibration set keeps empty texts, so that they are reported as errors.
            texts[split] = [text for _, text in file.read(keep_empty=split == "calibration")]
    if texts["validation"] is not None:
        texts["validation"] = texts["validation"][: data.validation.num_texts]
    if texts["train"] is not None:
        calibration = (texts["calibration"] or [])[: data.calibration.num_samples]
        used = {*calibration, *(texts["validation"] or []), *excluded}
        texts["train"] = [text for text in texts["train"] if text not in used][: data.train.num_texts]
        if not texts["train"]:
            raise UserError(
                f"{where}.train.path={data.train.path}: all of its texts are also calibration or validation texts; "
                "give another file."
            )
    return Corpora(**{split: texts[split] if split in splits else None for split in SPLITS})


def _check_file(data: DataConfig, split: str, where: str) -> Iterator[Problem]:
    file = _file_of(data, split, where)
    if file is None:
        return
    # The calibration file is read completely, because it decides the search; of other files, only the first document.
    calibrates = split == "calibration"
    texts, problems = file.check(None if calibrates else 1, keep_empty=calibrates)
    yield from problems
    if calibrates and texts:
        yield from _check_calibration(file, texts, data.calibration.num_samples)


def _check_calibration(file: TextFile, texts: Sequence[tuple[int, str]], num_samples: int) -> Iterator[Problem]:
    if len(texts) < num_samples:
        yield file.problem(
            f"has {len(texts)} texts, but data.calibration.num_samples={num_samples}; lower num_samples or give more "
            "texts."
        )
    for number, text in texts[:num_samples]:
        if is_empty(text):
            yield file.problem(f"the text of {file.place(number)} is empty; remove it.")


def _check_hub(data: DataConfig, where: str) -> Iterator[Problem]:
    if not data.dataset:
        yield Problem(f"{where}.dataset", f"data={data.name} comes from the hub; name the dataset (owner/name).", None)
        return
    for split in ("train", "validation"):
        if data.streaming and getattr(data.splits, split) and getattr(data, split).num_texts is None:
            text = f"{where}.streaming=true would read the entire split; set a number of texts."
            yield Problem(f"{where}.{split}.num_texts", text, None)
