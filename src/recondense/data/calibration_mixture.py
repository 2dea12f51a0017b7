"""Mix the documents of a calibration set from several sources, each with a weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from recondense.config.problems import Problem
from recondense.config.schema import DataConfig, SourceConfig
from recondense.data.hub import HubSplit, read_split
from recondense.data.text_files import TextFile
from recondense.errors import UserError

SETTING = "data.calibration.sources"  # recovery stages have no calibration set, so there is one name


def mix_sources(data: DataConfig) -> list[str]:
    """Return the first documents of each source, `data.calibration.num_samples` in all, interleaved evenly.

    Raises:
        UserError: a source cannot be read or has too few documents.
    """
    sources = data.calibration.sources
    assert sources is not None
    counts = shares(data.calibration.num_samples, [source.weight for source in sources])
    return interleave(
        [
            _read(source, count, f"{SETTING}[{index}]") if count else []
            for index, (source, count) in enumerate(zip(sources, counts, strict=True))
        ]
    )


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` into whole numbers in proportion to the weights. The largest remainders are rounded up.

    If remainders are equal, the first is rounded up first.
    """
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def interleave(groups: Sequence[Sequence[Any]]) -> list[Any]:
    """Merge groups, keeping their order and spacing each evenly: entry j of n is placed at (j + ½)/n of the result."""
    places = [((j + 0.5) / len(group), index, j) for index, group in enumerate(groups) for j in range(len(group))]
    return [groups[index][j] for _, index, j in sorted(places)]


def _read(source: SourceConfig, count: int, name: str) -> list[str]:
    """Return the first `count` documents of a source; `name` is its name in the config."""
    if source.path is not None:
        texts = [text for _, text in _file_of(source, name).read(count)]
    else:
        split = HubSplit(
            dataset=source.dataset,
            subset=source.subset,
            split=source.split,
            streaming=source.streaming,
            text_field=source.text_field,
            form=source.form,
            where=name,
            setting=f"{name}.split",
        )
        texts = read_split(split, count)
    if len(texts) < count:
        raise UserError(f"{name} {_too_few(len(texts), count)}")
    return texts


def _file_of(source: SourceConfig, name: str) -> TextFile:
    return TextFile(str(source.path), source.text_field, source.form, where=name, setting=f"{name}.path")


def _too_few(number: int, count: int) -> str:
    return (
        f"has {number} texts, but its share is {count}; lower its weight or data.calibration.num_samples, or give "
        "more texts."
    )


def check_sources(data: DataConfig) -> Iterator[Problem]:
    """Yield the problems of the sources that show without a model."""
    sources, num_samples = data.calibration.sources, data.calibration.num_samples
    if sources is None:
        return
    if not sources:
        yield Problem(SETTING, "name at least one source, or set it to null.", [])
        return
    if (path := data.calibration.path) is not None:
        yield Problem("data.calibration.path", f"{SETTING} is set too; set one of them to null.", path)
    counts = shares(num_samples, [source.weight for source in sources])
    for index, (source, count) in enumerate(zip(sources, counts, strict=True)):
        name = f"{SETTING}[{index}]"
        if not count:
            text = f"no text of data.calibration.num_samples={num_samples} would come from it; raise one of them."
            yield Problem(f"{name}.weight", text, source.weight)
        elif (source.path is None) == (source.dataset is None):
            yield Problem(name, "set either path (a local file) or dataset (a name on the hub).")
        elif source.path is not None:
            file = _file_of(source, name)
            texts, problems = file.check(count)
            yield from problems
            if texts and len(texts) < count:
                yield file.problem(_too_few(len(texts), count))
