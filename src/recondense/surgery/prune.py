"""Prune routed experts: their weights and their router rows go."""

from __future__ import annotations

import torch
from torch import nn

from recondense.models import views
from recondense.models.views import SparseBlock
from recondense.operations import Prune
from recondense.surgery.checks import check_experts


def restructure(block: SparseBlock, operation: Prune) -> nn.Module:
    """The pruned block, filled at once: its tensors are rows of the block's own, in fresh memory.

    Raises:
        UserError: experts that do not exist, fewer than top_k, factorized or merged experts, unequal groups.
    """
    check_experts(block, operation.kind, operation.retained)
    assert block.weights is not None  # whole experts, or its error
    with torch.no_grad():
        experts = block.chosen_experts(operation.retained)
        router = views.pruned_router(block, operation.retained)
    return views.with_parts(block.module, router=router, experts=experts)
