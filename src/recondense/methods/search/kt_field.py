"""The block-wise KT-reception field: which candidate of each layer goes best with those of its neighbours.

T consecutive MoE layers are a block, with any dense layers between them. Every combination of their K candidates runs
through whole decoder layers (attention, norms and residual included), on the states that the layers pruned so far
leave; the one nearest to the original's hidden state at the block's end is kept, and the next block goes on from it.

Reference: MoE-I², arXiv 2411.01016, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.models import views
from recondense.models.hooks import evaluating
from recondense.models.layer_store import layer_store
from recondense.models.tensor_store import Shelf

Set = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """What was decided for one block.

    Args:
        layers: its MoE layers.
        choice: for each the index of its candidate.
        error: ‖pruned − original‖_F of the hidden state leaving the last layer, over the original's norm.
        combinations: how many were tried.
    """

    layers: tuple[int, ...]
    choice: tuple[int, ...]
    error: float
    combinations: int


@torch.no_grad()
def reception_field(
    model: PreTrainedModel,
    tape: Tape,
    candidates: Mapping[int, Sequence[Set]],
    block_size: int,
    known: Sequence[Block] = (),
    decided: Callable[[list[Block]], None] = lambda blocks: None,
) -> list[Block]:
    """Choose one candidate a layer, block after block.

    Combinations share prefixes: K + K² + … + K^T runs of a MoE layer for a block, not T·K^T. Dense layers between MoE
    layers run with the MoE layer before them.

    Args:
        model: as the tape saw it; left bit-identical.
        tape: its hidden states.
        candidates: for each MoE layer, ascending, the sets of experts to drop; an empty set leaves the layer alone.
        block_size: T.
        known: the first blocks, decided in an earlier run: their states are made again, nothing is tried.
        decided: called after each block with all so far.

    Returns:
        the blocks, in order. The first combination wins a tie.
    """
    layers = sorted(candidates)
    states = tape.states[layers[0]] if layers else tape.storage.shelf()
    found = list(known)
    with evaluating(model):
        for number, first in enumerate(range(0, len(layers), block_size)):
            own = tuple(layers[first : first + block_size])
            stretches = [*zip(own, [*own[1:], own[-1] + 1], strict=True)]
            if number == len(found):
                errors, norm = _errors(model, tape, candidates, stretches, states)
                best = min(errors, key=lambda choice: (errors[choice], choice))
                found.append(Block(own, best, (errors[best] / max(norm, 1e-300)) ** 0.5, len(errors)))
                decided(found)
            if first + block_size < len(layers):
                for (layer, end), place in zip(stretches, found[number].choice, strict=True):
                    states = _run(model, tape, states, layer, end, candidates[layer][place])
                for layer in range(own[-1] + 1, layers[first + block_size]):  # dense layers before the next block
                    states = _through(model, tape, states, layer, None)
    return found


def _errors(
    model: PreTrainedModel,
    tape: Tape,
    candidates: Mapping[int, Sequence[Set]],
    stretches: Sequence[tuple[int, int]],
    states: Shelf,
) -> tuple[dict[tuple[int, ...], float], float]:
    """Squared errors of every combination, and the squared norm of what they are compared with.

    All combinations go through a layer before the next one is needed: one reading of its weights, and K^(T-1) states
    of one layer are held.
    """
    live: dict[tuple[int, ...], Shelf] = {(): states}
    for layer, end in stretches[:-1]:
        live = {
            (*chosen, place): _through(model, tape, before, layer, dropped)
            for chosen, before in live.items()
            for place, dropped in enumerate(candidates[layer])
        }
        for dense in range(layer + 1, end):
            for chosen in live:  # one after the other in place: no second copy of all of them
                live[chosen] = _through(model, tape, live[chosen], dense, None)
    layer, end = stretches[-1]
    assert end == layer + 1  # nothing behind the last MoE layer of a block
    errors: dict[tuple[int, ...], float] = {}
    for chosen, before in live.items():
        for place, dropped in enumerate(candidates[layer]):
            after = _through(model, tape, before, layer, dropped)
            errors[*chosen, place] = _squares(tape, after, tape.states[end])
    return errors, _squares(tape, tape.states[end], None)


def _squares(tape: Tape, states: Shelf, others: Shelf | None) -> float:
    """‖states − others‖² over the real tokens, summed over blocks of texts in their order."""
    sums = []
    for index, hidden_BSD in enumerate(states):
        wanted_TD = tape.real_tokens(index, hidden_BSD).double()
        if others is not None:
            wanted_TD = wanted_TD - tape.real_tokens(index, others[index]).double()
        sums.append(float(wanted_TD.square().sum()))
    return sum(tape.texts.in_order(sums))


def _run(model: PreTrainedModel, tape: Tape, states: Shelf, layer: int, end: int, dropped: Set) -> Shelf:
    """All texts from the input of a MoE layer, with some experts dropped, to the input of layer `end`."""
    states = _through(model, tape, states, layer, dropped)
    for each in range(layer + 1, end):
        states = _through(model, tape, states, each, None)
    return states


def _through(model: PreTrainedModel, tape: Tape, states: Shelf, layer: int, dropped: Set | None) -> Shelf:
    found = tape.storage.shelf()
    with layer_store(model).resident(layer):
        blocks = {}
        if dropped:
            block = views.sparse_blocks(model)[layer]
            blocks = {layer: views.masked_block(block, [e for e in range(block.num_experts) if e not in dropped])}
        with views.swapped(model, blocks):
            for index, hidden_BSD in enumerate(states):
                found.append(tape.run_layer(model, layer, index, hidden_BSD))
    return found
