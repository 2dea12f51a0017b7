"""Match the rows of one expert to those of another: an expert is the same function in any order of its rows.

Legend: F expert width, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ROWS = {"gate_proj": 0, "up_proj": 0, "down_proj": 1, "gate_proj_bias": 0, "up_proj_bias": 0}  # where neurons lie


def aligned(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other expert with its F rows permuted so that they are most like the reference's.

    The permutation maximises the sum of inner products of gate rows, up rows and down columns (weight matching).

    Args:
        reference, other: gate_proj (F, D), up_proj (F, D), down_proj (D, F) of an expert, and its biases if it has any.

    Returns:
        the other's weights, permuted; the same function.

    Reference: MC-SMoE, arXiv 2310.01334, section 3.1; Git Re-Basin, arXiv 2209.04836, section 3.2.
    """
    width = other["down_proj"].shape[1]
    gain_FF = torch.zeros(width, width, dtype=torch.float64)
    for name in ("gate_proj", "up_proj", "down_proj"):
        mine, theirs = (each[name].movedim(ROWS[name], 0).double() for each in (reference, other))
        gain_FF += (mine @ theirs.T).cpu()
    _, order = linear_sum_assignment(gain_FF.numpy(), maximize=True)
    index = torch.as_tensor(order, device=other["down_proj"].device)
    return {name: each.index_select(ROWS[name], index) if name in ROWS else each for name, each in other.items()}
