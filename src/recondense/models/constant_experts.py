"""Routed experts some of which are constants. This file imports only torch, because it is bundled into exports.

Legend: T tokens, K top-k, S = T·K routed tokens, s those of them that select an expert with weights, D hidden size, C
constants.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from recondense.models.replacement_blocks import shallow_copy


class ConstantExperts:
    """Adds constants to a family's fused experts: E_e(x) = c_{e-n} for every index e from the number n of experts.

    It is mixed into the family's class, so the weights of the experts keep their names, and the family's own
    implementation computes them. Tokens that select a constant do not enter it.

    Attributes:
        constants: the constants (C, D).

    Reference: MoNE, arXiv 2507.00390.
    """

    constants: nn.Parameter
    num_experts: int

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute Σ_k top_k_weights · E_{top_k_index}(x).

        Args:
            hidden_states: x (T, D).
            top_k_index: the selected experts and constants (T, K).
            top_k_weights: their routing weights (T, K).

        Returns:
            The weighted sum (T, D).
        """
        if not top_k_index.numel():
            return torch.zeros_like(hidden_states)
        # A dense product, so that every constant has a gradient in every process.
        is_constant_TK = top_k_index >= self.num_experts
        place_TK = (top_k_index - self.num_experts).clamp_min(0)
        weights_TC = top_k_weights.new_zeros(len(hidden_states), len(self.constants))
        weights_TC = weights_TC.scatter_add(1, place_TK, top_k_weights * is_constant_TK)
        output_TD = weights_TC.to(self.constants.dtype) @ self.constants

        chosen_s = (~is_constant_TK.flatten()).nonzero().flatten()
        expert_s, weight_s = top_k_index.flatten()[chosen_s], top_k_weights.flatten()[chosen_s]
        if not len(chosen_s):  # one token of weight 0, for the gradients
            chosen_s = chosen_s.new_zeros(1)
            expert_s, weight_s = chosen_s, top_k_weights.flatten()[:1] * 0
        top_k = top_k_index.shape[1]
        routed: Any = super()
        y_sD = routed.forward(hidden_states[chosen_s // top_k], expert_s[:, None], weight_s[:, None])
        y_SD = y_sD.new_zeros(top_k_index.numel(), y_sD.shape[1]).index_copy(0, chosen_s, y_sD)
        return (y_SD.unflatten(0, (-1, top_k)).sum(dim=1) + output_TD).to(hidden_states.dtype)


@cache
def _with_constants(kind: Any) -> Any:
    return type(f"Constant{kind.__name__}", (ConstantExperts, kind), {})


def add_constants(experts: nn.Module, constants_CD: Tensor) -> nn.Module:
    """Return fused experts with constants after them; the weights are shared.

    Args:
        experts: the fused experts of a family.
        constants_CD: the constants.
    """
    duplicate, kind = shallow_copy(experts), cast(Any, type(experts))
    duplicate.__class__ = _with_constants(kind)
    duplicate.register_parameter("constants", nn.Parameter(constants_CD, requires_grad=False))
    return duplicate
