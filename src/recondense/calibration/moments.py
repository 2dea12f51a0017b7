"""Second moments of the inner activations of experts on the calibration set.

Legend: D hidden size, F expert width, K top-k, t tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recondense.calibration.trace import LayerTrace
from recondense.models.replacement_blocks import MoEWeights, expert_inner


def tokens_of(trace: LayerTrace, expert: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a text batch's tokens that select an expert, and their routing weights (t,) in fp64."""
    selected_TK = trace.top_k_index_TK == expert
    rows = selected_TK.any(dim=1).nonzero().flatten()
    return rows, (trace.top_k_weights_TK * selected_TK).sum(dim=1)[rows].double()


@torch.no_grad()
def inner_moments(weights: MoEWeights, traces: Sequence[LayerTrace]) -> Callable[[int], Tensor]:
    """Return a function that computes Σ w² h hᵀ (F, F) of an expert in fp64.

    h is the input of the expert's down projection, and w the routing weight, summed over the tokens that select the
    expert. The moments of all experts together would need E·F² numbers, so they are computed one at a time.
    """

    def sum_products(expert: int) -> Tensor:
        width = weights.down_EDF.shape[2]
        moment_FF = torch.zeros(width, width, dtype=torch.float64, device=weights.down_EDF.device)
        for trace in traces:
            rows, weight_t = tokens_of(trace, expert)
            inner_tF = weight_t[:, None] * expert_inner(trace.x_TD[rows], weights, expert).double()
            moment_FF.addmm_(inner_tF.T, inner_tF)
        return moment_FF

    return sum_products
