"""Score the experts of a layer by how the calibration tokens use them, or by their weights.

Legend: T tokens, t tokens that select one expert, E routed experts, K top-k, D hidden size, F expert width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recondense.calibration.tape import Tape
from recondense.calibration.trace import LayerTrace
from recondense.methods.search.routing import routing_totals
from recondense.methods.step import Record
from recondense.models.moe_blocks import SparseBlock
from recondense.models.replacement_blocks import MoEWeights, expert_outputs

log = logging.getLogger(__name__)

SALIENCIES = {
    "random": "a random number",
    "frequency": "the number of calibration tokens that select the expert",
    "routing_weight": "the sum of its routing weights",
    "reap": "the mean of routing weight x norm of the expert's output, over the tokens that select it",
    "expert_drop": "the sum of routing weight x norm of the expert's output",
    "man": "the mean norm of the expert's output, over the tokens that select it",
    "msan": "the mean squared norm of the expert's output, over the tokens that select it",
    "aimer": "root mean square / mean absolute value of the expert's weights",
}
WITHOUT_TEXTS = ("random", "aimer")  # saliencies that do not depend on the calibration set
FEW_TOKENS = 10  # a score from fewer tokens is mostly chance
MOST_NAMED = 12  # experts that a warning names


@torch.no_grad()
def score_experts(saliency: str, tape: Tape, traces: Sequence[LayerTrace], block: SparseBlock) -> Record:
    """Score the experts of a layer on the calibration set.

    Args:
        saliency: one of `SALIENCIES`, except those in `WITHOUT_TEXTS`.
        tape: the tape that the traces belong to.
        traces: the traces of the layer on this process's texts.
        block: the layer. Its weights are in memory.

    Returns:
        `saliency`, the score of each expert, and `selected`, the number of tokens that select it. An expert that no
        token selects has the score 0.
    """
    counts_E, weights_E = routing_totals(tape, traces, block.num_experts)
    if saliency == "frequency":
        scores_E = counts_E.double()
    elif saliency == "routing_weight":
        scores_E = weights_E
    else:
        weighted, power = saliency in ("reap", "expert_drop"), 2 if saliency == "msan" else 1
        scores_E = tape.texts.total(_norms(block, trace, weighted, power) for trace in traces)
        if saliency != "expert_drop":
            scores_E = scores_E / counts_E.clamp_min(1)
    return {"saliency": scores_E.tolist(), "selected": counts_E.tolist()}


def _norms(block: SparseBlock, trace: LayerTrace, weighted: bool, power: int) -> Tensor:
    """Sum ‖E(x)‖₂ over the tokens of a text batch that select each expert; (E,) in fp64.

    Args:
        block: the layer.
        trace: its trace on the text batch.
        weighted: multiply the norms by the routing weights.
        power: the power of the norms.
    """
    norms = []
    for expert in range(block.num_experts):
        selected_TK = trace.top_k_index_TK == expert
        rows = selected_TK.any(dim=1)
        norm_t = expert_outputs(trace.x_TD[rows], block.weights, [expert])[0].double().norm(dim=1) ** power
        if weighted:
            norm_t = (trace.top_k_weights_TK * selected_TK).sum(dim=1)[rows].double() * norm_t
        norms.append(norm_t.sum())
    return torch.stack(norms)


@torch.no_grad()
def inverse_aimer(weights: MoEWeights) -> list[float]:
    """Score experts by their weights alone: sqrt(mean w²) / mean |w| over all weights of an expert's projections.

    AIMER is the reciprocal, mean |w| / sqrt(mean w²), and the experts with the largest AIMER are pruned. It is largest
    if all weights are equally large. Biases do not count. An expert whose weights are all 0 has the score 0.

    Reference: AIMER, arXiv 2603.18492; the formula is that of the authors' code.
    """
    scores = []
    for expert in range(weights.down_EDF.shape[0]):
        parts = [part.double() for part in weights.projections(expert).values()]
        number = sum(part.numel() for part in parts)
        absolute = sum(float(part.abs().sum()) for part in parts) / number
        square = sum(float(part.square().sum()) for part in parts) / number
        scores.append(square**0.5 / absolute if absolute else 0.0)
    return scores


def few_tokens(selected: Mapping[int, Sequence[float]]) -> dict[int, list[int]]:
    """Return the experts that fewer than FEW_TOKENS calibration tokens select, by layer.

    Args:
        selected: for each layer, how many tokens select each expert.
    """
    named = {layer: [e for e, count in enumerate(counts) if count < FEW_TOKENS] for layer, counts in selected.items()}
    return {layer: experts for layer, experts in named.items() if experts}


def warn_of_few_tokens(selected: Mapping[int, Sequence[float]]) -> Record:
    """Log one warning that names the experts whose scores rest on a handful of tokens.

    Args:
        selected: for each layer, how many tokens select each expert.

    Returns:
        Entries for the plan's search record: `selected`, and `few_tokens`, the named experts by layer.
    """
    named = few_tokens(selected)
    number, total = sum(map(len, named.values())), sum(map(len, selected.values()))
    if number:
        never = sum(1 for layer, experts in named.items() for expert in experts if not selected[layer][expert])
        log.warning(
            "%d of %d experts are selected by fewer than %d calibration tokens%s: %s. Their scores are mostly chance; "
            "use more or longer calibration texts (data.calibration.num_samples, data.calibration.max_length)",
            *(number, total, FEW_TOKENS, f", {never} of them by none" if never else "", name_experts(named)),
        )
    return {
        "selected": {str(layer): list(counts) for layer, counts in selected.items()},
        "few_tokens": {str(layer): experts for layer, experts in named.items()},
    }


def name_experts(experts: Mapping[int, Sequence[int]], most: int = MOST_NAMED) -> str:
    """Return experts by layer in words, such as "layer 3: 1, 7; layer 5: 2"; at most `most` of them."""
    parts, remaining = [], most
    for layer, indices in experts.items():
        if remaining <= 0:
            break
        parts.append(f"layer {layer}: {', '.join(map(str, indices[:remaining]))}")
        remaining -= len(indices)
    return "; ".join(parts) + (", ..." if remaining < 0 or len(parts) < len(experts) else "")
