"""Sum up a router's decisions on the calibration set.

Legend: T tokens, E routed experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recondense.calibration.tape import Tape
from recondense.calibration.trace import LayerTrace


def routing_totals(tape: Tape, traces: Sequence[LayerTrace], num_experts: int) -> tuple[Tensor, Tensor]:
    """Count how often each expert is selected, and sum its routing weights, over all texts.

    Args:
        tape: the tape that the traces belong to.
        traces: the traces of this process's texts.
        num_experts: E.

    Returns:
        Counts (E,), int64, and sums of routing weights (E,), fp64, over the texts of all processes; on the CPU.
    """
    both = [count_and_sum(trace, num_experts) for trace in traces]
    return tape.texts.total(counts_E for counts_E, _ in both), tape.texts.total(sums_E for _, sums_E in both)


def count_and_sum(trace: LayerTrace, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return for each expert how many tokens of a trace select it, int64, and the sum of its weights, fp64; (E,)."""
    index_TK = trace.top_k_index_TK
    # An expert occurs at most once in a token's top-k, so a dense (T, E) has all weights, summed in a fixed order.
    weights_TE = trace.top_k_weights_TK.new_zeros(index_TK.shape[0], num_experts, dtype=torch.float64)
    weights_TE.scatter_(1, index_TK, trace.top_k_weights_TK.double())
    counts_E = torch.zeros_like(weights_TE, dtype=torch.int64).scatter_(1, index_TK, 1).sum(dim=0)
    return counts_E, weights_TE.sum(dim=0)
