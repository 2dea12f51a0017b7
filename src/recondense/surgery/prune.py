"""Prune routed experts: remove their weights and their router rows."""

from __future__ import annotations

import torch
from torch import nn

from recondense.models import moe_blocks
from recondense.models.moe_blocks import SparseBlock
from recondense.operations import Prune


def restructure(block: SparseBlock, operation: Prune) -> nn.Module:
    """Make the pruned block with its weights, which are copies of rows of the previous block's tensors.

    Raises:
        UserError: the operation names experts that do not exist or retains fewer than top_k; the experts are factorized
            or merged; or the groups of experts would have different sizes.
    """
    block.require_experts(operation.retained, operation.kind)
    assert block.weights is not None  # raises for factorized experts
    with torch.no_grad():
        experts = block.select_experts(operation.retained)
        router = moe_blocks.pruned_router(block, operation.retained)
    return moe_blocks.replace_parts(block.module, router=router, experts=experts)
