"""A calibration set that is mixed from several sources, each with its weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from recondense.config.schema import DataConfig, SourceConfig, SplitConfig, SplitNames
from recondense.data.corpus import Corpora
from recondense.data.text_files import read_texts
from recondense.errors import UserError

SETTING = re.compile(r"(?<![\w./-])data\.(train\.path|splits\.train|splits|dataset|subset|text_field|form)\b")


def mixed(data: DataConfig, load: Callable[[DataConfig, list[str]], Corpora]) -> list[str]:
    """`data.calibration.num_samples` documents of all sources: the first ones of each, spread evenly over the whole.

    Args:
        load: reads the training split of a data config.

    Raises:
        UserError: a source that cannot be read, or has too few documents.
    """
    sources = data.calibration.sources
    assert sources is not None
    counts = shares(data.calibration.num_samples, [source.weight for source in sources])
    texts = [
        _read(source, count, index, load) for index, (source, count) in enumerate(zip(sources, counts, strict=True))
    ]
    return interleaved(texts)


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to weights that add up to `total`: what is left over goes to the largest remainders.

    Equal remainders: to the first.
    """
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def interleaved(groups: Sequence[Sequence[Any]]) -> list[Any]:
    """All entries, each group's in their order and spread evenly: the j-th of n stands at the share (j + ½)/n."""
    places = [((j + 0.5) / len(group), index, j) for index, group in enumerate(groups) for j in range(len(group))]
    return [groups[index][j] for _, index, j in sorted(places)]


def _read(source: SourceConfig, count: int, index: int, load: Callable[[DataConfig, list[str]], Corpora]) -> list[str]:
    where = f"data.calibration.sources[{index}]"
    if not count:
        return []
    data = DataConfig(
        source="hub" if source.path is None else "texts",
        dataset=source.dataset,
        subset=source.subset,
        splits=SplitNames(train=source.split),
        streaming=source.streaming,
        train=SplitConfig(source.path, count),
        text_field=source.text_field,
        form=source.form,
    )
    try:
        found = load(data, ["train"]).train or []
    except UserError as error:
        raise UserError(_renamed(str(error), where)) from error
    if len(found) < count:
        raise UserError(f"{where} has {len(found)} texts, but {count} are its share; {_remedy()}")
    return found


def _remedy() -> str:
    return "lower its weight or data.calibration.num_samples, or give more texts."


def _renamed(message: str, where: str) -> str:
    """A message about a data config's settings, as one about those of a source."""
    own = {"train.path": "path", "splits.train": "split", "splits": "split"}
    return SETTING.sub(lambda found: f"{where}.{own.get(found[1], found[1])}", message)


def check_sources(data: DataConfig) -> Iterator[str]:
    """Problems of the sources that show without a model."""
    sources, num_samples = data.calibration.sources, data.calibration.num_samples
    if sources is None:
        return
    name = "data.calibration.sources"
    if not sources:
        yield f"{name} is an empty list: name at least one source, or set it to null."
        return
    if data.calibration.path is not None:
        yield f"data.calibration.path={data.calibration.path}: {name} is given too; set one of them to null."
    wrong = [index for index, source in enumerate(sources) if not source.weight > 0]
    for index in wrong:
        yield f"{name}[{index}].weight={sources[index].weight}: must be above 0; leave the source out instead."
    counts = [1] * len(sources) if wrong else shares(num_samples, [source.weight for source in sources])
    for index, (source, count) in enumerate(zip(sources, counts, strict=True)):
        if not count:
            yield (
                f"{name}[{index}].weight={source.weight}: none of data.calibration.num_samples={num_samples} texts "
                "would come from it; raise either."
            )
        elif (source.path is None) == (source.dataset is None):
            yield f"{name}[{index}]: give either path (a local file) or dataset (a name of the hub)."
        elif source.path is not None:
            yield from _check_file(source, count, f"{name}[{index}]")


def _check_file(source: SourceConfig, count: int, where: str) -> Iterator[str]:
    path = Path(str(source.path))
    if not path.is_file():
        yield f"{where}.path={path}: {'is a folder; a file is needed' if path.is_dir() else 'there is no such file'}."
        return
    try:
        texts = (text for _, text in read_texts(path, source.text_field, source.form) if text)
        found = len(list(islice(texts, count)))
    except UserError as error:
        yield _renamed(f"{where}.path={path}: {error}", where)
        return
    if found < count:
        yield f"{where}.path={path}: has {found} texts, but {count} are its share; {_remedy()}"
