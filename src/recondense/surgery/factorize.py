"""Factorize routed experts: replace projections by products of two factors (MoE-I², arXiv 2411.01016, section 3.2)."""

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
from recondense.models.moe_blocks import SparseBlock
from recondense.models.replacement_blocks import expert_inner
from recondense.operations import Factorize

Moments = Callable[[int], tuple[Tensor, Tensor]]


def restructure(block: SparseBlock, operation: Factorize) -> LowRankExperts:
    """Make low-rank experts with the operation's ranks without filling them, on the experts' device and in their dtype.

    Raises:
        UserError: the ranks are for another number of experts or above the full rank, or the experts are already
            factorized.
    """
    weights = block.weights
    num_experts, hidden_size, expert_width = weights.down_EDF.shape
    num_ranks = len(operation.ranks["gate_proj"])
    full = min(hidden_size, expert_width)
    if num_ranks != num_experts:
        raise UserError(
            f"plan: factorize, layer {block.layer}: there are ranks for {num_ranks} experts, but the layer has "
            f"{num_experts}"
        )
    high = [rank for ranks in operation.ranks.values() for rank in ranks if rank is not None and rank > full]
    if high:
        raise UserError(f"plan: factorize, layer {block.layer}: ranks {high} are above the full rank {full}")
    with torch.device(weights.down_EDF.device):
        experts = LowRankExperts(hidden_size, expert_width, operation.ranks, weights.glu, bool(weights.biases()))
    return experts.to(weights.down_EDF.dtype)


def fill(experts: LowRankExperts, before: SparseBlock, moments: Moments | None = None) -> None:
    """Compute the factors of the previous experts.

    Args:
        experts: the low-rank experts to fill.
        before: the previous block.
        moments: second moments of the projections' inputs, used for whitening; None for no whitening.
    """
    weights = before.weights

    def compute_factors(expert: int, name: str) -> tuple[Tensor, Tensor]:
        weight = weights.projections(expert)[name]
        if moments is None:
            return factors(weight)
        return factors(weight, moments(expert)[1 if name == "down_proj" else 0])

    experts.fill(weights.projections, compute_factors, weights.biases())


def second_moments(block: SparseBlock, traces: Sequence[LayerTrace]) -> Moments:
    """Compute second moments of each expert's inputs on the calibration set.

    They are Σ x xᵀ and Σ h hᵀ over the tokens that are routed to the expert, with h the input of its down projection.

    Args:
        block: the layer.
        traces: the traces of the layer on the calibration set.

    Returns:
        A function of the expert index that returns the moments (D, D) for gate_proj and up_proj and (F, F) for
        down_proj, in fp64. They are computed for one expert at a time, because all experts together would need
        E·(D² + F²) numbers.

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
