"""The block-wise KT-reception field: choose the candidates of neighbouring layers together.

T consecutive MoE layers, with any dense layers between them, form a group (the paper calls it a block). All
combinations of their K candidates run through the complete decoder layers of the group (including attention, norms and
residuals), starting from the states that the pruned layers below produce. The combination whose hidden state at the end
of the group is closest to the original's is chosen, and the next group starts from its states.

Legend: B texts of a batch, S their padded length, T real tokens of a batch, D hidden size.

Reference: MoE-I², arXiv 2411.01016, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.methods.search.genetic import ExpertSet
from recondense.models import moe_blocks
from recondense.models.hooks import eval_mode
from recondense.models.layer_store import layer_store
from recondense.models.tensor_store import TensorList


@dataclass(frozen=True)
class Group:
    """The decision for one group of layers.

    Args:
        layers: the MoE layers of the group.
        choice: the index of each layer's candidate.
        error: ‖pruned − original‖_F / ‖original‖_F of the hidden states that leave the last layer.
        combinations: the number of combinations that were tried.
    """

    layers: tuple[int, ...]
    choice: tuple[int, ...]
    error: float
    combinations: int


@torch.no_grad()
def reception_field(
    model: PreTrainedModel,
    tape: Tape,
    candidates: Mapping[int, Sequence[ExpertSet]],
    group_size: int,
    known: Sequence[Group] = (),
    on_decision: Callable[[list[Group]], None] = lambda groups: None,
) -> list[Group]:
    """Choose one candidate per layer, one group after another.

    Combinations share prefixes, so a group takes K + K² + … + K^T runs of a MoE layer instead of T·K^T. Dense layers
    between MoE layers run with the MoE layer before them.

    Args:
        model: the recorded model; it stays bit-identical.
        tape: its hidden states.
        candidates: the sets of experts to drop, by MoE layer. An empty set does not change the layer.
        group_size: T.
        known: the first groups, decided in an earlier run. Only their states are computed again.
        on_decision: called after each group with all groups so far.

    Returns:
        The groups in order. Among equal errors, the first combination is chosen.
    """
    layers = sorted(candidates)
    states = tape.states[layers[0]] if layers else tape.storage.tensor_list()
    groups = list(known)
    with eval_mode(model):
        for number, first in enumerate(range(0, len(layers), group_size)):
            members = tuple(layers[first : first + group_size])
            stretches = [*zip(members, [*members[1:], members[-1] + 1], strict=True)]
            if number == len(groups):
                errors, norm = _errors(model, tape, candidates, stretches, states)
                best = min(errors, key=lambda choice: (errors[choice], choice))
                groups.append(Group(members, best, (errors[best] / max(norm, 1e-300)) ** 0.5, len(errors)))
                on_decision(groups)
            if first + group_size < len(layers):
                for (layer, end), place in zip(stretches, groups[number].choice, strict=True):
                    states = _run_stretch(model, tape, states, layer, end, candidates[layer][place])
                for layer in range(members[-1] + 1, layers[first + group_size]):  # dense layers before the next group
                    states = _run_layer(model, tape, states, layer)
    return groups


def _errors(
    model: PreTrainedModel,
    tape: Tape,
    candidates: Mapping[int, Sequence[ExpertSet]],
    stretches: Sequence[tuple[int, int]],
    states: TensorList,
) -> tuple[dict[tuple[int, ...], float], float]:
    """Compute the squared error of every combination of a group, and the squared norm of the original's states.

    All combinations run through a layer before the next layer is needed, so that its weights are read once. K^(T-1)
    lists of states are in memory.

    Args:
        model: the recorded model.
        tape: its hidden states.
        candidates: the sets of experts to drop, by MoE layer.
        stretches: for each MoE layer of the group, its index, and that of the next MoE layer or of the group's end.
        states: the states that enter the group.
    """
    live: dict[tuple[int, ...], TensorList] = {(): states}
    for layer, end in stretches[:-1]:
        live = {
            (*choice, place): _run_layer(model, tape, before, layer, dropped)
            for choice, before in live.items()
            for place, dropped in enumerate(candidates[layer])
        }
        for dense in range(layer + 1, end):
            for choice in live:  # replaced one by one, so that there is no second copy of all states
                live[choice] = _run_layer(model, tape, live[choice], dense)
    layer, end = stretches[-1]
    assert end == layer + 1  # nothing follows the last MoE layer of a group
    errors: dict[tuple[int, ...], float] = {}
    for choice, before in live.items():
        for place, dropped in enumerate(candidates[layer]):
            after = _run_layer(model, tape, before, layer, dropped)
            errors[*choice, place] = _squared_norm(tape, after, tape.states[end])
    return errors, _squared_norm(tape, tape.states[end])


def _squared_norm(tape: Tape, states: TensorList, others: TensorList | None = None) -> float:
    """Compute ‖states − others‖² over the real tokens, summed over the text batches in order."""
    sums = []
    for index, hidden_BSD in enumerate(states):
        difference_TD = tape.real_tokens(index, hidden_BSD).double()
        if others is not None:
            difference_TD = difference_TD - tape.real_tokens(index, others[index]).double()
        sums.append(float(difference_TD.square().sum()))
    return sum(tape.texts.in_order(sums))


def _run_stretch(
    model: PreTrainedModel, tape: Tape, states: TensorList, layer: int, end: int, dropped: ExpertSet
) -> TensorList:
    """Run all texts from the input of a MoE layer, with some experts dropped, to the input of layer `end`."""
    states = _run_layer(model, tape, states, layer, dropped)
    for dense in range(layer + 1, end):
        states = _run_layer(model, tape, states, dense)
    return states


def _run_layer(
    model: PreTrainedModel, tape: Tape, states: TensorList, layer: int, dropped: ExpertSet = ()
) -> TensorList:
    """Run all texts through one decoder layer, without the dropped experts."""
    outputs = tape.storage.tensor_list()
    with layer_store(model).resident(layer):
        blocks = {}
        if dropped:
            block = moe_blocks.sparse_blocks(model)[layer]
            blocks = {layer: moe_blocks.masked_block(block, [e for e in range(block.num_experts) if e not in dropped])}
        with moe_blocks.swap_blocks(model, blocks):
            for index, hidden_BSD in enumerate(states):
                outputs.append(tape.run_layer(model, layer, index, hidden_BSD))
    return outputs
