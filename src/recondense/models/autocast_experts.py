"""Fused experts under autocast: grouped products of weights that are kept in fp32.

Autocast has no rule for transformers' grouped products: they would compute in the dtype of the weights.
transformers' other way, one expert after another, is slow in training, where the backward pass of every expert's slice
fills a tensor as large as the weights of all experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "grouped_mm_autocast"


@contextmanager
def autocast_experts(model: PreTrainedModel, enabled: bool = True) -> Iterator[None]:
    """Inside the context, compute fused experts in the dtype of autocast.

    Grouped products stay grouped. Experts of any other implementation are computed one after another.
    """
    before: dict[str, str | None] = model.get_experts_implementation()  # by the name of a part of the model
    if enabled:
        ALL_EXPERTS_FUNCTIONS.register(NAME, grouped_in_autocast)
        inside = {part: NAME if name == "grouped_mm" else "eager" for part, name in before.items()}
        model.set_experts_implementation(inside)
    try:
        yield
    finally:
        if enabled:
            model.set_experts_implementation(before)


def grouped_in_autocast(experts: nn.Module, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Compute fused experts as grouped products in the dtype of autocast.

    Args:
        experts: the module.
        x_TD: hidden states (T, D).
        index_TK: the experts that each token selects (T, K).
        weight_TK: their routing weights (T, K).

    Returns:
        The weighted sums (T, D), in the dtype of the hidden states.
    """
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    device = x_TD.device.type
    if not torch.is_autocast_enabled(device):
        return grouped(experts, x_TD, index_TK, weight_TK)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        y_TD: Tensor = grouped(_Converted(experts, dtype), x_TD.to(dtype), index_TK, weight_TK)
    return y_TD.to(x_TD.dtype)


class _Converted:
    """An experts module whose tensors are converted when they are read."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
