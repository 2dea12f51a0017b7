"""Cross-entropy with the LM head inside, by Liger's kernel where that is installed and tensors are on a GPU.

Liger's divergences are not used: its fused linear JSD holds the loss of every token and vocabulary entry, (T, V) in
fp32, which is what chunks are there to avoid.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from torch import Tensor

MASKED = -100  # the label of a token that is not to be predicted


@cache
def _liger() -> Any:
    """Liger's module, None without it."""
    try:
        return importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    except ImportError:
        return None


def usable(hidden_TD: Tensor) -> bool:
    """Whether the kernel can take these hidden states."""
    return hidden_TD.device.type == "cuda" and _liger() is not None


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor) -> Tensor:
    """Σ_t -log softmax(W h_t + b)[label_t] over labels that are not MASKED, a scalar in fp32."""
    loss = _liger().LigerFusedLinearCrossEntropyLoss(ignore_index=MASKED, reduction="sum")
    found: Tensor = loss(weight_VD, hidden_TD, labels_T, bias_V)
    return found.float()
