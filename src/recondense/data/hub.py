"""Read documents of a dataset on the Hugging Face hub, or of a local copy of one."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

from recondense.config.problems import json_type
from recondense.config.schema import DataConfig
from recondense.data.instruction_records import detect_form, read_record
from recondense.data.json_files import field_of
from recondense.data.text_files import is_article, split_documents
from recondense.data.valid_text import is_empty, repair
from recondense.errors import UserError
from recondense.offline import hub_access
from recondense.progress import track

log = logging.getLogger(__name__)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # they name the file and say what is wrong
# If several splits of a run have the same name on the hub, they take its documents in this order.
ORDER = ("calibration", "validation", "train")


@dataclass(frozen=True)
class HubSplit:
    """A split of a dataset, and its names in the config.

    Args:
        dataset, subset, split: the names on the hub.
        streaming: read rows as they are needed instead of the entire split.
        text_field: the field of a row that is a document; not used with `form`.
        form: the form of the rows if they are records (see instruction_records.py); None if they are texts.
        where: the dotted name of these settings in the config, for messages.
        setting: the setting that names the split, for messages.
    """

    dataset: str | None
    subset: str | None
    split: str
    streaming: bool
    text_field: str
    form: str | None
    where: str
    setting: str

    def documents(self) -> Iterator[str]:
        """Yield the documents that are not empty. The rows of WikiText, one per line, are joined into articles.

        Lone surrogates become U+FFFD; rows whose text is null are left out. Both are counted in the log.
        """
        rows = self._records(self.form) if self.form is not None else self._texts()
        first = next((row for row in rows if not is_empty(row)), None)
        if first is None:
            return
        rows = chain([first], rows)
        if is_article(first):
            yield from (text for _, text in split_documents(rows))
        else:
            yield from (row for row in rows if not is_empty(row))

    def _texts(self) -> Iterator[str]:
        """Yield the text field of every row that has one."""
        absent = repaired = 0
        try:
            for index, row in enumerate(self._rows()):
                value = self._value(index, row)
                if value is None:
                    absent += 1
                    continue
                text = repair(value)
                repaired += text is not value
                yield text
        finally:  # there may be more rows than are needed
            if absent:
                log.info("%s: %d rows with null in %r are left out", self._name, absent, self.text_field)
            if repaired:
                log.info("%s: %d texts had lone surrogates, halves of characters; now U+FFFD", self._name, repaired)

    def _value(self, index: int, row: Mapping[str, Any]) -> str | None:
        try:
            value = field_of(row, self.text_field)
        except KeyError:
            self._refuse(f"row {index} (from 0) has no field {self.text_field!r} (fields: {', '.join(row)})")
        if value is not None and not isinstance(value, str):
            texts = ", ".join(name for name, entry in row.items() if isinstance(entry, str)) or "none"
            kind = json_type(value)
            self._refuse(
                f"row {index} (from 0) has {kind} in {self.text_field!r}, not a text (fields with text: {texts})"
            )
        return value

    def _refuse(self, text: str) -> NoReturn:
        raise UserError(f"{self._name}: {text}; set {self.where}.text_field.")

    def _records(self, form: str) -> Iterator[str]:
        """Yield every row as a `Record`."""
        for index, row in enumerate(self._rows()):
            try:
                form = detect_form(row) if form == "auto" else form
                record = read_record(row, form, f"{self.dataset}, split {self.split!r}, row {index} (from 0)")
            except UserError as error:
                raise UserError(f"{self._name}: row {index} (from 0) {error}; {self.where}.form={form}") from None
            yield record.repaired()

    @property
    def _name(self) -> str:
        subset = f" ({self.subset})" if self.subset else ""
        return f"{self.where}.dataset={self.dataset}{subset}, split {self.split!r}"

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows. Whatever the library raises about the dataset becomes a UserError.

        Raises:
            UserError: the dataset, subset or split does not exist or cannot be read, or the hub cannot be reached.
        """
        try:
            import datasets

            yield from datasets.load_dataset(self.dataset, name=self.subset, split=self.split, streaming=self.streaming)
        except Exception as error:
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise
            if _is_network_error(error) and not Path(str(self.dataset)).is_dir():
                raise UserError(
                    f"{self._name.partition(', split')[0]}: the hub cannot be reached and the dataset is not in the "
                    "cache; check the network, or use data=texts with local files."
                ) from error
            raise UserError(
                f"{self._name}: {_reason(error)}. Check {self.where}.dataset, {self.where}.subset and {self.setting}."
            ) from error


def _reason(error: BaseException) -> str:
    """Return the first lines of an error and of its cause, which says what is wrong with a file of the dataset."""
    lines = [(str(part).splitlines() or [type(part).__name__])[0] for part in (error, error.__cause__) if part]
    return ": ".join(dict.fromkeys(line.rstrip(".:") for line in lines))


def read_split(split: HubSplit, count: int) -> list[str]:
    """Return the first `count` documents of a split.

    Raises:
        UserError: the dataset, subset, split or field does not exist, the split has no document, or the hub cannot be
            reached.
    """
    with hub_access():
        return _take(split, split.documents(), count, split.split)


def hub_corpora(
    data: DataConfig, splits: set[str], apart: Iterable[str] = (), where: str = "data"
) -> dict[str, list[str]]:
    """Return the documents of a dataset's splits.

    The calibration set is the first `num_samples` documents of its split that are not empty; the other splits skip
    them. The rows of WikiText (one per line) are joined into articles; otherwise each row is a document, with
    `data.form` a `Record`.

    Args:
        data: the settings of the data.
        splits: the splits to return.
        apart: documents that are removed from the training texts.
        where: the dotted name of `data` in the config, for messages.

    Raises:
        UserError: the dataset, subset, split or field does not exist, no document remains for a split, or the hub
            cannot be reached.
    """
    counts = {"calibration": data.calibration.num_samples}
    counts |= {split: getattr(data, split).num_texts for split in ("validation", "train")}
    streams: dict[str, Iterator[str]] = {}
    documents: dict[str, list[str]] = {}
    used: set[str] = set()
    with hub_access():
        for name in _needed(data, splits):
            split = _split_of(data, name, where)
            stream = streams.setdefault(split.split, split.documents())
            if name == "train":
                used.update(apart)
            documents[name] = _take(split, (text for text in stream if text not in used), counts[name], name)
            if name == "calibration":
                used.update(documents[name])
    return {name: texts for name, texts in documents.items() if name in splits}


def _split_of(data: DataConfig, name: str, where: str) -> HubSplit:
    return HubSplit(
        dataset=data.dataset,
        subset=data.subset,
        split=getattr(data.splits, name),
        streaming=data.streaming,
        text_field=data.text_field,
        form=data.form,
        where=where,
        setting=f"{where}.splits.{name}",
    )


def _take(split: HubSplit, documents: Iterator[str], count: int | None, name: str) -> list[str]:
    """Return the first `count` documents of a split, or as many as there are.

    Raises:
        UserError: there is none.
    """
    texts = list(track(islice(documents, count), f"reading {split.dataset} ({name})", count))
    if not texts:
        raise UserError(
            f"{split.setting}={split.split}: {split.dataset} has no more texts for it; choose another split, or fewer "
            "texts for the splits that are read before."
        )
    return texts


def _needed(data: DataConfig, splits: set[str]) -> list[str]:
    """Return the splits that must be read, in order: the requested ones, and those that they exclude."""
    configured = [split for split in ORDER if getattr(data.splits, split)]
    return [
        split
        for index, split in enumerate(configured)
        if split in splits
        or (split == "calibration" and "train" in splits)
        or any(
            later in splits and getattr(data.splits, later) == getattr(data.splits, split)
            for later in configured[index + 1 :]
        )
    ]


def _is_network_error(error: Exception) -> bool:
    """Return whether an error comes from the connection; errors of the HTTP libraries are not OSErrors."""
    libraries = {"httpx", "httpcore", "aiohttp", "requests"}
    connection = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    return connection or type(error).__module__.partition(".")[0] in libraries
