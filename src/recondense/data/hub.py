"""Texts of a dataset on the Hugging Face hub (or of a local folder in its form), and whether the hub is reachable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

from recondense.config.schema import DataConfig
from recondense.data.records import form_of, read_record
from recondense.data.text_files import documents, is_article
from recondense.errors import UserError
from recondense.offline import reachable_or_offline
from recondense.progress import track

# Splits of the same name are dealt out in this order, so that no document is in two of them.
ORDER = ("calibration", "validation", "train")


def hub_corpora(data: DataConfig, wanted: set[str], apart: Iterable[str] = ()) -> dict[str, list[str]]:
    """The wanted splits of a hub dataset, as documents.

    The calibration set is the first `num_samples` documents of its split that are not empty; the other splits skip it.
    A dataset of WikiText's form (one line a row) is joined to articles; elsewhere a row is a document, and with
    `data.form` a `Record`.

    Args:
        apart: documents that the training texts may not have.

    Raises:
        UserError: the dataset, subset, split or field does not exist, or too little is left for a split.
        UserError: the hub cannot be reached.
    """
    counts = {"calibration": data.calibration.num_samples}
    counts |= {split: getattr(data, split).num_texts for split in ("validation", "train")}
    streams: dict[str, Iterator[str]] = {}
    found: dict[str, list[str]] = {}
    taken: set[str] = set()
    with reachable_or_offline():
        for split in _needed(data, wanted):
            name = getattr(data.splits, split)
            stream = streams.setdefault(name, _texts(_rows(data, split)))
            if split == "train":
                taken.update(apart)
            texts = islice((text for text in stream if text not in taken), counts[split])
            found[split] = list(track(texts, f"reading {data.dataset} ({split})", counts[split]))
            if split == "calibration":
                taken.update(found[split])
            if not found[split]:
                raise UserError(
                    f"data.splits.{split}={name}: {data.dataset} has no text left for it; choose another split, or "
                    "fewer texts for the splits before it."
                )
    return {split: texts for split, texts in found.items() if split in wanted}


def _needed(data: DataConfig, wanted: set[str]) -> list[str]:
    """The configured splits that must be read, in order: those wanted, and those that a wanted one leaves out."""
    configured = [split for split in ORDER if getattr(data.splits, split)]
    return [
        split
        for index, split in enumerate(configured)
        if split in wanted
        or (split == "calibration" and "train" in wanted)
        or any(
            later in wanted and getattr(data.splits, later) == getattr(data.splits, split)
            for later in configured[index + 1 :]
        )
    ]


def _rows(data: DataConfig, split: str) -> Iterator[str]:
    """The text field of every row of a split, or the row as a record."""
    name = getattr(data.splits, split)
    with _explained(data, split):
        import datasets

        rows: Iterable[dict[str, Any]] = datasets.load_dataset(
            data.dataset, name=data.subset, split=name, streaming=data.streaming
        )
        if data.form is not None:
            yield from _records(rows, data.form)
            return
        for index, row in enumerate(rows):
            if index == 0 and data.text_field not in row:
                raise UserError(f"no field {data.text_field!r} (fields: {', '.join(row)}); set data.text_field")
            yield row[data.text_field] or ""


def _records(rows: Iterable[dict[str, Any]], form: str) -> Iterator[str]:
    for index, row in enumerate(rows):
        try:
            form = form_of(row) if form == "auto" else form
            yield read_record(row, form)
        except ValueError as error:
            raise UserError(f"row {index} (from 0) {error}; data.form={form}") from None


def _texts(rows: Iterator[str]) -> Iterator[str]:
    """Documents without the empty ones."""
    first = next((row for row in rows if row.strip()), None)
    if first is None:
        return
    all_rows = chain([first], rows)
    if is_article(first):
        yield from (text for _, text in documents(all_rows))
    else:
        yield from (row for row in all_rows if row.strip())


@contextmanager
def _explained(data: DataConfig, split: str) -> Iterator[None]:
    """Say in one sentence what went wrong with the hub."""
    where = f"data.dataset={data.dataset}" + (f" ({data.subset})" if data.subset else "")
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        name = getattr(data.splits, split)
        raise UserError(
            f"{where}, split {name!r}: {reason}. Check data.dataset, data.subset and data.splits."
        ) from error
    except Exception as error:
        if not _is_network(error):
            raise
        raise UserError(
            f"{where}: the hub cannot be reached and the cache does not hold it; check the network, or use data=texts "
            "with local files."
        ) from error


def _is_network(error: Exception) -> bool:
    """Whether an error comes from the connection; the HTTP libraries' errors are no OSError."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in {
        "httpx",
        "httpcore",
        "aiohttp",
        "requests",
    }
