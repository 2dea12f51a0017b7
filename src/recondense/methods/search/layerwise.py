"""Searches that treat each layer on its own: what the cache lacks is searched, by all processes.

Each of them takes a layer, or, where a layer's record is made of sums over texts, its own texts of every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from recondense import processes
from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.models.layer_store import layer_store
from recondense.progress import Stage, progress

Record = dict[str, Any]
Cache = MutableMapping[str, Record]


def lacking(
    cache: Cache, names: Mapping[int, str], enough: Callable[[Record], bool] = lambda record: True
) -> list[int]:
    """The layers whose records the cache does not have, or not all that is asked of them."""
    known = {layer: cache.get(name) for layer, name in names.items()}
    return [layer for layer, record in known.items() if record is None or not enough(record)]


def layerwise(
    model: PreTrainedModel,
    tape: Callable[[], Tape],
    cache: Cache,
    names: Mapping[int, str],
    work: Callable[[Tape, int, Record | None, Stage], Record],
    description: str,
    enough: Callable[[Record], bool] = lambda record: True,
    failed: dict[int, str] | None = None,
    by_text: bool = False,
) -> tuple[dict[int, Record], int]:
    """One record a layer.

    Args:
        tape: gives the states on the calibration set; called only if something is searched.
        cache: records found so far; written after every layer.
        names: for each layer, what the cache calls its record.
        work: searches a layer, whose weights are in memory: gets the states around it on all texts, the layer, what
            the cache has of it, and the progress to note something on.
        description: shown as progress.
        enough: whether a record that the cache has answers all that is asked.
        failed: takes the message of a UserError of `work`, by layer; None: it is raised.
        by_text: `work` gets the states on this process's texts, and puts together what all processes found, with
            `tape.texts.total` or `tape.texts.in_order`; none has to be sent the states of others.

    Returns:
        the records that were found, by layer, and how many of them came out of the cache.
    """
    wanted = lacking(cache, names, enough)
    known = {layer: cache.get(name) for layer, name in names.items()}
    reused = len(names) - len(wanted)
    with progress(description, len(names)) as bar:
        bar.advance(reused)
        # Where every process has all texts, each of them searches all layers.
        together = processes.world_size() if wanted and tape().texts.split and not by_text else 1
        for first in range(0, len(wanted), together):
            layers = wanted[first : first + together]
            for layer, (record, error) in zip(
                layers, _each(model, tape(), layers, known, work, bar, by_text), strict=True
            ):
                if error is not None and failed is None:
                    raise error
                if error is not None and failed is not None:
                    failed[layer] = str(error)
                known[layer] = record
                if record is not None:
                    cache[names[layer]] = record
                bar.advance()
    return {layer: record for layer, record in known.items() if record is not None}, reused


def _each(
    model: PreTrainedModel,
    tape: Tape,
    layers: Sequence[int],
    known: dict[int, Record | None],
    work: Callable[[Tape, int, Record | None, Stage], Record],
    bar: Stage,
    by_text: bool,
) -> list[tuple[Record | None, UserError | None]]:
    """What the processes find for some layers, one each; all of them get all of it."""
    apart = tape.texts.split and not by_text
    own = tape.excerpt(layers) if apart else tape
    found: tuple[Record | None, UserError | None] = None, None
    if own is not None:
        layer = layers[processes.rank()] if apart else layers[0]
        try:
            with layer_store(model).resident(layer):
                found = work(own, layer, known[layer], bar), None
        except UserError as error:
            found = None, error
    return processes.gather(found)[: len(layers)] if apart else [found]
