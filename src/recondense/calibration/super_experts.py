"""Find super experts: the few experts whose outputs make massive activations, and without which a model is wrecked.

Legend: T tokens, t tokens that select one expert, E routed experts, K top-k, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from recondense.calibration.tape import Tape
from recondense.calibration.trace import LayerTrace
from recondense.models import moe_blocks
from recondense.models.layer_store import layer_store
from recondense.models.moe_blocks import SparseBlock

LEAST_MASSIVE = 100.0  # a massive activation is larger than this,
TIMES_MEDIAN = 1000.0  # and than this many times the median of the hidden state
OF_LARGEST = 0.1  # a super expert's largest output, as a fraction of the largest of all experts
RARE = 0.005  # at most this fraction of all experts are super experts,
LEAST_RARE = 3  # or this many in a model with few experts

Outputs = dict[int, dict[int, float]]  # by layer and expert: the largest magnitude in the expert's outputs


@torch.no_grad()
def find_super_experts(tape: Tape, advance: Callable[[], None] = lambda: None) -> Outputs:
    """Find the experts whose outputs make massive activations in the hidden states of the calibration texts.

    An entry of a hidden state is massive if its magnitude is above 100 and above 1000 times the median magnitude of
    its text batch. A layer forms massive activations if an entry is massive after its MoE block but not before it. Of
    the experts in such layers, those are super experts whose largest output magnitude (of the down projection, without
    routing weight) is above 100, above a tenth of the largest, and among the largest 0.5% of all experts of the model
    (at least three). The first condition is ours: without massive activations no model has super experts. We also
    compare only the experts of the layers that form massive activations, while the paper leaves out the upper layers.

    Only layers in which a massive activation appears run again, so other models cost one pass over the recorded states.

    Args:
        tape: the tape of the model.
        advance: called after each layer.

    Returns:
        For each layer with super experts, the largest output magnitude of each.

    Reference: Unveiling Super Experts, arXiv 2507.23279, and its code; Massive Activations, arXiv 2402.17762.
    """
    blocks = moe_blocks.sparse_blocks(tape.model)
    largest: dict[tuple[int, int], float] = {}
    for layer, block in blocks.items():
        if _appears(tape, layer):
            traces = tape.trace(tape.model, layer)
            formed = [_is_formed(tape, layer, index, trace) for index, trace in enumerate(traces)]
            if any(flag for flags in tape.texts.gather(formed) for flag in flags):
                with layer_store(tape.model).resident(layer):
                    maxima = tape.texts.in_order([_largest_outputs(block, trace) for trace in traces])
                for expert, value in enumerate(torch.stack(maxima).amax(dim=0).tolist()):
                    largest[layer, expert] = value
        advance()
    most = max(LEAST_RARE, math.ceil(RARE * sum(block.num_experts for block in blocks.values())))
    bound = max(LEAST_MASSIVE, OF_LARGEST * max(largest.values(), default=0.0))
    order = sorted((place for place, value in largest.items() if value > bound), key=lambda place: -largest[place])
    outputs: Outputs = {}
    for layer, expert in sorted(order[:most]):
        outputs.setdefault(layer, {})[expert] = largest[layer, expert]
    return outputs


def _appears(tape: Tape, layer: int) -> bool:
    """Return whether an entry is massive in a state that leaves a decoder layer, but not where it enters."""

    def appears(index: int) -> bool:
        leaving_TD = tape.real_tokens(index, tape.states[layer + 1][index]).float().abs()
        if float(leaving_TD.max()) <= LEAST_MASSIVE:
            return False
        entering_TD = tape.real_tokens(index, tape.states[layer][index]).float().abs()
        return bool(((leaving_TD > _bound(leaving_TD)) & (entering_TD <= _bound(entering_TD))).any())

    flags = [appears(index) for index in range(len(tape.texts.local))]
    return any(flag for shares in tape.texts.gather(flags) for flag in shares)


def _is_formed(tape: Tape, layer: int, index: int, trace: LayerTrace) -> bool:
    """Return whether an entry is massive after a layer's MoE block but not before it, on a local text batch."""
    after_TD = tape.real_tokens(index, tape.states[layer + 1][index]).float()
    bound = _bound(after_TD.abs())
    before_TD = after_TD - trace.output_TD.float()
    return bool(((after_TD.abs() > bound) & (before_TD.abs() <= bound)).any())


def _bound(magnitudes_TD: Tensor) -> float:
    """Return the magnitude above which an entry of these states is massive."""
    return max(LEAST_MASSIVE, TIMES_MEDIAN * float(magnitudes_TD.median()))


def _largest_outputs(block: SparseBlock, trace: LayerTrace) -> Tensor:
    """Return the largest magnitude in each expert's outputs for the tokens that select it; (E,), 0 without tokens.

    The experts are called as the block calls them, so that experts of any kind can be measured.
    """
    largest_E = torch.zeros(block.num_experts, dtype=torch.float64)
    for expert in range(block.num_experts):
        x_tD = trace.x_TD[(trace.top_k_index_TK == expert).any(dim=1)]
        if len(x_tD):
            index_t1 = torch.full((len(x_tD), 1), expert, device=x_tD.device)
            weights_t1 = torch.ones(len(x_tD), 1, dtype=x_tD.dtype, device=x_tD.device)
            largest_E[expert] = float(block.experts(x_tD, index_t1, weights_t1).abs().max())
    return largest_E
