"""A tiny model with one super expert: a single expert makes massive activations on which the later layers rely."""

from __future__ import annotations

from typing import Any

import torch

from recondense.models import moe_blocks
from support.tiny_models import EVERY, recorded

LAYER = 1
CHANNEL = 7  # of the hidden state, the one with the massive activations


def with_super_expert(family: str) -> tuple[Any, int]:
    """The model, and the super expert of LAYER: of those that tokens select, one that few tokens select."""
    model = EVERY[family]()
    index_TK = torch.cat([trace.top_k_index_TK for trace in recorded(model).trace(model, LAYER)])
    counts = torch.bincount(index_TK.flatten(), minlength=6).tolist()
    expert = min((e for e in range(6) if counts[e] > 1), key=lambda e: (counts[e], e))
    with torch.no_grad():
        moe_blocks.sparse_blocks(model)[LAYER].weights.down_EDF[expert, CHANNEL] *= 2e5
    return model, expert
