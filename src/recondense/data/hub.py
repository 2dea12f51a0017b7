"""Documents of a data set on the Hugging Face hub, or of a local folder in its form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from recondense.config.schema import DataConfig
from recondense.data.records import detect_form, read_record
from recondense.data.text_files import is_article, split_documents
from recondense.errors import UserError
from recondense.offline import hub_access
from recondense.progress import track

# Splits of the same name are dealt out in this order, so that no document is in two of them.
ORDER = ("calibration", "validation", "train")


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set, and what the config calls it.

    Args:
        dataset, subset, split: the hub's names.
        streaming: read rows as they are needed, not the whole split.
        text_field: the field of a row that is a document; not used with `form`.
        form: of the rows, which are records then (see records.py).
        where: the group of these settings, for messages.
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
        """Documents that are not empty. Rows in WikiText's form, one line each, are joined to articles."""
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
        """The text field of every row, or every row as a record."""
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
        """Say in one sentence what went wrong with the hub."""
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
                f"{name}: the hub cannot be reached and the cache does not hold it; check the network, or use "
                "data=texts with local files."
            ) from error


def read_split(split: HubSplit, count: int) -> list[str]:
    """The first documents of a split.

    Raises:
        UserError: the data set, subset, split or field does not exist, the split has no document, or the hub cannot be
            reached.
    """
    with hub_access():
        return _take(split, split.documents(), count, split.split)


def hub_corpora(
    data: DataConfig, splits: set[str], apart: Iterable[str] = (), where: str = "data"
) -> dict[str, list[str]]:
    """Splits of a data set, as documents.

    The calibration set is the first `num_samples` documents of its split that are not empty; the other splits skip it.
    Rows in WikiText's form (one line each) are joined to articles; elsewhere a row is a document, and with `data.form`
    a `Record`.

    Args:
        splits: the splits to return.
        apart: documents that the training texts may not have.
        where: what the config calls `data`, for messages.

    Raises:
        UserError: the data set, subset, split or field does not exist, or too little is left for a split.
        UserError: the hub cannot be reached.
    """
    counts = {"calibration": data.calibration.num_samples}
    counts |= {split: getattr(data, split).num_texts for split in ("validation", "train")}
    streams: dict[str, Iterator[str]] = {}
    documents: dict[str, list[str]] = {}
    taken: set[str] = set()
    with hub_access():
        for name in _needed(data, splits):
            split = _split_of(data, name, where)
            stream = streams.setdefault(split.split, split.documents())
            if name == "train":
                taken.update(apart)
            documents[name] = _take(split, (text for text in stream if text not in taken), counts[name], name)
            if name == "calibration":
                taken.update(documents[name])
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
    """The first documents of a split, or all that are there.

    Raises:
        UserError: there is none.
    """
    texts = list(track(islice(documents, count), f"reading {split.dataset} ({name})", count))
    if not texts:
        raise UserError(
            f"{split.setting}={split.split}: {split.dataset} has no text left for it; choose another split, or fewer "
            "texts for the splits before it."
        )
    return texts


def _needed(data: DataConfig, splits: set[str]) -> list[str]:
    """The configured splits that must be read, in order: those asked for, and those whose documents these leave out."""
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
    """Whether an error comes from the connection; the HTTP libraries' errors are no OSError."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in {
        "httpx",
        "httpcore",
        "aiohttp",
        "requests",
    }
