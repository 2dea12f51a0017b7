"""Match the rows of one expert to those of another: an expert is the same function in any order of its rows.

Legend: F expert width, D hidden size.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def aligned(reference: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The other expert with its F rows permuted so that they are most like the reference's.

    The permutation maximises the sum of inner products of gate rows, up rows and down columns (weight matching).

    Args:
        reference, other: gate_up (2F, D) and down (D, F) of an expert.

    Returns:
        the other's weights, permuted; the same function.

    Reference: MC-SMoE, arXiv 2310.01334, section 3.1; Git Re-Basin, arXiv 2209.04836, section 3.2.
    """
    gain_FF = torch.zeros(other[1].shape[1], other[1].shape[1], dtype=torch.float64)
    for mine, theirs in zip(_parts(reference), _parts(other), strict=True):
        gain_FF += (mine.double() @ theirs.double().T).cpu()
    _, order = linear_sum_assignment(gain_FF.numpy(), maximize=True)
    gate_FD, up_FD, _ = _parts(other)
    index = torch.as_tensor(order, device=gate_FD.device)
    return torch.cat((gate_FD[index], up_FD[index])), other[1][:, index]


def _parts(expert: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and down, each with one row a neuron: (F, D)."""
    gate_FD, up_FD = expert[0].chunk(2, dim=0)
    return gate_FD, up_FD, expert[1].T
