"""Fused experts with fewer channels. This file imports only torch, because it is bundled into exports.

Legend: E experts, D hidden size, F expert width, n retained channels of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recondense.models.replacement_blocks import shallow_copy

WIDTHS = ("intermediate_dim", "intermediate_size")  # attributes of experts modules


def fused_width(experts: Any) -> int:
    """Return F of fused experts; down_proj is (E, D, F), or (E, F, D) if it is stored transposed."""
    return int(experts.down_proj.shape[1 if getattr(experts, "is_transposed", False) else 2])


def select_channels(experts: Any, index_En: Tensor) -> nn.Module:
    """Return a copy of fused experts with only some channels of each expert.

    Args:
        experts: a family's own experts module, in any orientation and with or without biases.
        index_En: the channels to retain, in order.

    Returns:
        A module of the same class. The biases of down_proj are shared.
    """
    width, transposed = fused_width(experts), bool(getattr(experts, "is_transposed", False))
    if getattr(experts, "is_concatenated", True):
        rows_EH = torch.cat((index_En, index_En + width), dim=1)
    else:
        rows_EH = torch.stack((2 * index_En, 2 * index_En + 1), dim=2).flatten(1)
    narrow: Any = shallow_copy(experts)
    parts = {"gate_up_proj": (rows_EH, 2 if transposed else 1), "down_proj": (index_En, 1 if transposed else 2)}
    if hasattr(experts, "gate_up_proj_bias"):
        parts["gate_up_proj_bias"] = rows_EH, 1
    for name, (index, dim) in parts.items():
        tensor = getattr(experts, name).detach()
        index = index.to(tensor.device)
        if tensor.dim() == 3:
            index = index.unsqueeze(3 - dim)
        cut = torch.take_along_dim(tensor, index, dim)
        narrow._parameters[name] = nn.Parameter(cut, getattr(experts, name).requires_grad)
    for name in WIDTHS:
        if getattr(narrow, name, None) == width:
            setattr(narrow, name, index_En.shape[1])
    return narrow  # type: ignore[no-any-return]


def first_channels(experts: Any, width: int) -> nn.Module:
    """Return a copy of fused experts with the first `width` channels of each expert."""
    index_n = torch.arange(width, device=experts.down_proj.device)
    return select_channels(experts, index_n.expand(len(experts.down_proj), -1))
