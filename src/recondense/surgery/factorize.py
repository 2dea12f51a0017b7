"""Factorize routed experts: projections become products of two factors (MoE-I², arXiv 2411.01016, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from recondense.calibration.trace import LayerTrace
from recondense.errors import UserError
from recondense.models.factors import factors
from recondense.models.low_rank import LowRankExperts
from recondense.models.replacement_blocks import expert_inner
from recondense.models.views import SparseBlock
from recondense.operations import Factorize

Moments = Callable[[int], tuple[Tensor, Tensor]]


def restructure(block: SparseBlock, operation: Factorize) -> LowRankExperts:
    """Factors of the operation's ranks, without their values, on the device and in the dtype of the experts.

    Raises:
        UserError: ranks for another number of experts, or above full rank; experts that are factorized already.
    """
    weights = block.weights
    num_experts, hidden_size, expert_width = weights.down_EDF.shape
    num_ranks = len(operation.ranks["gate_proj"])
    full = min(hidden_size, expert_width)
    if num_ranks != num_experts:
        raise UserError(f"plan: factorize layer {block.layer}: ranks for {num_ranks} experts, but it has {num_experts}")
    high = [rank for ranks in operation.ranks.values() for rank in ranks if rank is not None and rank > full]
    if high:
        raise UserError(f"plan: factorize layer {block.layer}: ranks {high} are above the full rank {full}")
    with torch.device(weights.down_EDF.device):
        experts = LowRankExperts(hidden_size, expert_width, operation.ranks, weights.glu, bool(weights.biases()))
    return experts.to(weights.down_EDF.dtype)


def fill(experts: LowRankExperts, before: SparseBlock, moments: Moments | None = None) -> None:
    """Compute the factors of the experts as they were.

    Args:
        moments: second moments of the projections' inputs, by which the weights are whitened; None: no whitening.
    """
    weights = before.weights

    def compute_factors(expert: int, name: str) -> tuple[Tensor, Tensor]:
        weight = weights.projections(expert)[name]
        if moments is None:
            return factors(weight)
        return factors(weight, moments(expert)[1 if name == "down_proj" else 0])

    experts.fill(weights.projections, compute_factors, weights.biases())


def second_moments(block: SparseBlock, traces: Sequence[LayerTrace]) -> Moments:
    """Second moments of each expert's inputs on the calibration set: Σ x xᵀ and Σ h hᵀ over the tokens routed to it.

    Returns:
        A function of the expert index. It gives (D, D) for gate_proj and up_proj and (F, F) for down_proj, in fp64, of
        one expert at a time: all experts together would take E·(D² + F²) numbers.

    Reference: SVD-LLM, arXiv 2403.07378, section 3.1.
    """
    weights = block.weights

    @lru_cache(maxsize=1)
    def sum_products(expert: int) -> tuple[Tensor, Tensor]:
        _, hidden_size, expert_width = weights.down_EDF.shape
        options: dict[str, Any] = {"dtype": torch.float64, "device": weights.down_EDF.device}
        inputs_DD = torch.zeros(hidden_size, hidden_size, **options)
        inner_FF = torch.zeros(expert_width, expert_width, **options)
        for trace in traces:
            x_tD = trace.x_TD[(trace.top_k_index_TK == expert).any(dim=1)]
            inner_tF = expert_inner(x_tD, weights, expert).double()
            inputs_DD.addmm_(x_tD.double().T, x_tD.double())
            inner_FF.addmm_(inner_tF.T, inner_tF)
        return inputs_DD, inner_FF

    return sum_products
