"""Read documents of a dataset on the Hugging Face hub, or of a local copy of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from recondense.config.schema import DataConfig
from recondense.data.instruction_records import detect_form, read_record
from recondense.data.text_files import is_article, split_documents
from recondense.errors import UserError
from recondense.offline import hub_access
from recondense.progress import track

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
        """Yield the documents that are not empty. The rows of WikiText, one per line, are joined into articles."""
        rows = self._rows()
        first = next((row for row in rows if row.strip()), None)
        if first is None:
            return
        rows = chain([first], rows)
        if is_article(first):
            yield from (text for _, text in split_documents(rows))
        else:
            yield from (row for row in rows if row.strip())

    def _rows(self) -> Iterator[str]:
        """Yield the text field of every row, or every row as a `Record`."""
        with self._explained():
            import datasets

            rows: Iterable[dict[str, Any]] = datasets.load_dataset(
                self.dataset, name=self.subset, split=self.split, streaming=self.streaming
            )
            if self.form is not None:
                yield from self._records(rows, self.form)
                return
            for index, row in enumerate(rows):
                if index == 0 and self.text_field not in row:
                    fields = ", ".join(row)
                    raise UserError(f"no field {self.text_field!r} (fields: {fields}); set {self.where}.text_field")
                yield row[self.text_field] or ""

    def _records(self, rows: Iterable[dict[str, Any]], form: str) -> Iterator[str]:
        for index, row in enumerate(rows):
            try:
                form = detect_form(row) if form == "auto" else form
                yield read_record(row, form)
            except ValueError as error:
                raise UserError(f"row {index} (from 0) {error}; {self.where}.form={form}") from None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of the hub and of the dataset into a UserError."""
        name = f"{self.where}.dataset={self.dataset}" + (f" ({self.subset})" if self.subset else "")
        try:
            yield
        except (FileNotFoundError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"{name}, split {self.split!r}: {reason}. Check {self.where}.dataset, {self.where}.subset and "
                f"{self.setting}."
            ) from error
        except Exception as error:
            if not _is_network_error(error):
                raise
            raise UserError(
                f"{name}: the hub cannot be reached and the dataset is not in the cache; check the network, or use "
                "data=texts with local files."
            ) from error


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
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in {
        "httpx",
        "httpcore",
        "aiohttp",
        "requests",
    }
