"""Score layers one after another, each on the states of the model in which the layers below it are already pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from recondense.calibration.tape import Tape
from recondense.calibration.trace import LayerTrace
from recondense.files import fingerprint
from recondense.methods.step import Record, SearchContext
from recondense.models import moe_blocks
from recondense.models.hooks import eval_mode
from recondense.models.layer_store import layer_store
from recondense.models.moe_blocks import SparseBlock
from recondense.models.tensor_store import TensorList
from recondense.operations import Prune
from recondense.progress import progress

Score = Callable[[Tape, Sequence[LayerTrace], SparseBlock], Record]
Decide = Callable[[int, Record], Prune | None]


@torch.no_grad()
def score_behind_pruned_layers(
    context: SearchContext, score: Score, decide: Decide, title: str
) -> tuple[dict[int, Record], list[Prune]]:
    """Score and prune the sparse layers from the lowest to the highest.

    Pruned experts are masked in the router, so no weights are copied. A layer's record in the cache is found again if
    the same experts were pruned below it.

    Args:
        context: the model, its tape and the cache.
        score: scores the experts of a layer, given its traces behind the layers pruned so far.
        decide: returns the operation of a layer, given its index and its scores; None prunes nothing.
        title: the description of the progress bar.

    Returns:
        The records by layer, and the operations.
    """
    records: dict[int, Record] = {}
    prunes: dict[int, Prune] = {}
    behind: _PrunedModel | None = None
    blocks = moe_blocks.sparse_blocks(context.model)
    with progress(title, len(blocks)) as bar:
        for layer, block in blocks.items():
            below = [[prune.layer, list(prune.retained)] for prune in prunes.values()]
            name = f"propagated-{layer:03d}-{fingerprint(below)}"
            record = context.cache_of(layer).get(name)
            if record is None:
                behind = behind or _PrunedModel(context.tape())
                traces = behind.trace(layer, prunes)
                with layer_store(context.model).resident(layer):
                    record = score(behind.tape, traces, block)
                context.cache_of(layer)[name] = record
            records[layer] = record
            prune = decide(layer, record)
            if prune is not None:
                prunes[layer] = prune
            bar.advance()
    return records, list(prunes.values())


class _PrunedModel:
    """The states of the calibration texts on their way up through the layers pruned so far.

    Args:
        tape: the tape of the unpruned model.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self._layer = 0
        self._states: TensorList = tape.states[0]

    def trace(self, layer: int, prunes: Mapping[int, Prune]) -> Sequence[LayerTrace]:
        """Return the traces of a layer behind the pruned layers, with the layer itself unpruned.

        Args:
            layer: a sparse layer, not below that of an earlier call.
            prunes: the operations of the layers below it.
        """
        changed = min(prunes, default=layer)
        if self._layer <= changed:  # nothing below is pruned
            self._layer, self._states = changed, self.tape.states[changed]
        while self._layer < layer:
            self._leave_layer(prunes.get(self._layer))
        if not prunes:
            return self.tape.trace(self.tape.model, layer)
        return self.tape.trace(self.tape.model, layer, self._states)

    def _leave_layer(self, prune: Prune | None) -> None:
        model, layer, entering = self.tape.model, self._layer, self._states
        self._layer, self._states = layer + 1, self.tape.storage.tensor_list()
        with eval_mode(model), layer_store(model).resident(layer):
            blocks = {}
            if prune is not None:
                blocks[layer] = moe_blocks.masked_block(moe_blocks.sparse_blocks(model)[layer], prune.retained)
            with moe_blocks.swap_blocks(model, blocks):
                for index, state_BSD in enumerate(entering):
                    self._states.append(self.tape.run_layer(model, layer, index, state_BSD))
