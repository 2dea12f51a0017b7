"""Searches that treat each layer independently: layers in the cache are read, and all processes search the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from recondense import processes
from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.methods.step import Record, SearchContext
from recondense.models.layer_store import layer_store
from recondense.progress import ProgressBar, progress


@dataclass(frozen=True)
class LayerTask:
    """One layer to search. Its weights are in memory.

    Args:
        layer: decoder-layer index.
        tape: the states before and after the layer, of all texts or of this process's texts.
        cached: the layer's record in the cache, if it is incomplete.
        bar: the progress bar, for notes on the progress within the layer.
    """

    layer: int
    tape: Tape
    cached: Record | None
    bar: ProgressBar


Work = Callable[[LayerTask], Record]


class LayerwiseSearch:
    """Makes one record per layer, and keeps the records in the cache.

    A record depends on its layer and on the layers below it only. Where an earlier round has changed none of these, the
    record is that of the first round.

    Args:
        context: the model, its tape and the cache.

    Attributes:
        reused: the number of records that came from the cache so far.
    """

    def __init__(self, context: SearchContext) -> None:
        self.context = context
        self.reused = 0

    def per_layer(
        self,
        names: Mapping[int, str],
        work: Work,
        title: str,
        complete: Callable[[int, Record], bool] = lambda layer, record: True,
    ) -> dict[int, Record]:
        """Search each layer in one process, on all texts. Different processes search different layers.

        Args:
            names: the name of each layer's record in the cache.
            work: searches one layer; `LayerTask.tape` has the states of all texts, but only around this layer.
            title: the description of the progress bar.
            complete: returns whether the cached record of a layer is complete.

        Returns:
            The records by layer.
        """
        records, missing = self._read(names, complete)
        with self._progress(title, names, missing) as bar:
            tape = self.context.tape() if missing else None
            # If every process has all texts, every process searches all layers.
            together = processes.world_size() if tape is not None and tape.texts.split else 1
            for first in range(0, len(missing), together):
                assert tape is not None
                layers = missing[first : first + together]
                tasks = [(layer, records.get(layer)) for layer in layers]
                for layer, (record, error) in zip(layers, self._share(tape, tasks, work, bar), strict=True):
                    if error is not None:
                        raise error
                    assert record is not None
                    records[layer] = self.context.cache_of(layer)[names[layer]] = record
                    bar.advance()
        return {layer: records[layer] for layer in names}

    def per_text(self, names: Mapping[int, str], work: Work, title: str) -> dict[int, Record]:
        """Search every layer in all processes, each on its own texts. This is for records that are sums over texts.

        Args:
            names: the name of each layer's record in the cache.
            work: searches one layer; `LayerTask.tape` has this process's texts. `tape.texts.total` and
                `tape.texts.in_order` combine the results of all processes.
            title: the description of the progress bar.

        Returns:
            The records by layer.
        """
        records, missing = self._read(names)
        with self._progress(title, names, missing) as bar:
            tape = self.context.tape() if missing else None
            for layer in missing:
                assert tape is not None
                with layer_store(self.context.model).resident(layer):
                    records[layer] = work(LayerTask(layer, tape, None, bar))
                self.context.cache_of(layer)[names[layer]] = records[layer]
                bar.advance()
        return {layer: records[layer] for layer in names}

    def _read(
        self, names: Mapping[int, str], complete: Callable[[int, Record], bool] = lambda layer, record: True
    ) -> tuple[dict[int, Record], list[int]]:
        """Return the cached records, and the layers whose records are missing or incomplete."""
        cached = {layer: self.context.cache_of(layer).get(name) for layer, name in names.items()}
        missing = [layer for layer, record in cached.items() if record is None or not complete(layer, record)]
        self.reused += len(names) - len(missing)
        return {layer: record for layer, record in cached.items() if record is not None}, missing

    @contextmanager
    def _progress(self, title: str, names: Mapping[int, str], missing: Sequence[int]) -> Iterator[ProgressBar]:
        with progress(title, len(names)) as bar:
            bar.advance(len(names) - len(missing))
            yield bar

    def _share(
        self, tape: Tape, tasks: Sequence[tuple[int, Record | None]], work: Work, bar: ProgressBar
    ) -> list[tuple[Record | None, UserError | None]]:
        """Search one layer per process, and return the records and errors of all processes on each of them."""
        excerpt = tape.excerpt([layer for layer, _ in tasks]) if tape.texts.split else tape
        outcome: tuple[Record | None, UserError | None] = None, None
        if excerpt is not None:
            layer, cached = tasks[processes.rank()] if tape.texts.split else tasks[0]
            try:
                with layer_store(self.context.model).resident(layer):
                    outcome = work(LayerTask(layer, excerpt, cached, bar)), None
            except UserError as error:  # to be raised by all processes together
                outcome = None, error
        return processes.gather(outcome)[: len(tasks)] if tape.texts.split else [outcome]
