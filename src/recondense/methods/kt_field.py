"""The block-wise KT-reception field: which candidate of each layer goes best with those of its neighbours.

T consecutive MoE layers are a block, with any dense layers between them. Every combination of their K candidates runs
through whole decoder layers (attention, norms and residual included), on the states that the layers pruned so far
leave; the one nearest to the original's hidden state at the block's end is kept, and the next block goes on from it.

Reference: MoE-I², arXiv 2411.01016, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense import families
from recondense.modes import evaluating

if TYPE_CHECKING:
    from recondense.calibrate import Tape

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
    advance: Callable[[], None] = lambda: None,
) -> list[Block]:
    """Choose one candidate a layer, block after block.

    Combinations share prefixes: K + K² + … + K^T runs of a MoE layer for a block, not T·K^T. Dense layers between MoE
    layers run with the MoE layer before them.

    Args:
        model: as the tape saw it; left bit-identical.
        tape: its hidden states.
        candidates: for each MoE layer, ascending, the sets of experts to drop; an empty set leaves the layer alone.
        block_size: T.
        advance: called after each block.

    Returns:
        the blocks, in order. The first combination wins a tie.
    """
    layers = sorted(candidates)
    states = list(tape.states[layers[0]]) if layers else []
    found = []
    with evaluating(model):
        for first in range(0, len(layers), block_size):
            own = tuple(layers[first : first + block_size])
            following = layers[first + block_size] if first + block_size < len(layers) else own[-1] + 1
            stretches = [*zip(own, [*own[1:], own[-1] + 1], strict=True)]
            best, errors = _best(model, tape, candidates, stretches, states)
            ends = [tape.real_tokens(index, state) for index, state in enumerate(tape.states[own[-1] + 1])]
            norm = sum(float(end_TD.double().square().sum()) for end_TD in ends)
            found.append(Block(own, best, (min(errors.values()) / max(norm, 1e-300)) ** 0.5, len(errors)))
            for index, hidden_BSD in enumerate(states):
                for (layer, end), place in zip(stretches, best, strict=True):
                    hidden_BSD = _run(model, tape, index, hidden_BSD, layer, end, candidates[layer][place])
                for layer in range(own[-1] + 1, following):  # dense layers before the next block
                    hidden_BSD = tape.run_layer(model, layer, index, hidden_BSD)
                states[index] = hidden_BSD
            advance()
    return found


def _best(
    model: PreTrainedModel,
    tape: Tape,
    candidates: Mapping[int, Sequence[Set]],
    stretches: Sequence[tuple[int, int]],
    states: Sequence[Tensor],
) -> tuple[tuple[int, ...], dict[tuple[int, ...], float]]:
    """Squared errors of every combination, and the best; depth first, so that one state a level is held."""
    errors: dict[tuple[int, ...], float] = {}

    def descend(index: int, hidden_BSD: Tensor, chosen: tuple[int, ...]) -> None:
        if len(chosen) == len(stretches):
            target_BSD = tape.states[stretches[-1][1]][index]
            difference_TD = tape.real_tokens(index, hidden_BSD).double() - tape.real_tokens(index, target_BSD).double()
            errors[chosen] = errors.get(chosen, 0.0) + float(difference_TD.square().sum())
            return
        layer, end = stretches[len(chosen)]
        for place, dropped in enumerate(candidates[layer]):
            descend(index, _run(model, tape, index, hidden_BSD, layer, end, dropped), (*chosen, place))

    for index, hidden_BSD in enumerate(states):
        descend(index, hidden_BSD, ())
    return min(errors, key=lambda choice: (errors[choice], choice)), errors


def _run(
    model: PreTrainedModel, tape: Tape, index: int, hidden_BSD: Tensor, layer: int, end: int, dropped: Set
) -> Tensor:
    """One block of texts from the input of a MoE layer, with some experts dropped, to the input of layer `end`."""
    block = families.sparse_blocks(model)[layer]
    retained = [expert for expert in range(block.num_experts) if expert not in dropped]
    masked = families.masked_block(block, retained) if dropped else block.module
    with families.swapped(model, {layer: masked}):
        for each in range(layer, end):
            hidden_BSD = tape.run_layer(model, each, index, hidden_BSD)
    return hidden_BSD
