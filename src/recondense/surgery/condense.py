"""Condense a sparse MoE layer into a dense one (arXiv 2412.00069, section 3)."""

from __future__ import annotations

from torch import nn

from recondense.models.moe_blocks import SparseBlock
from recondense.models.replacement_blocks import CondensedMoE
from recondense.operations import Condense


def restructure(block: SparseBlock, operation: Condense) -> CondensedMoE:
    """Make the condensed block without its weights: the shared rows, then F rows per expert.

    If `operation.shared_gate` is None, the block has a gate per token.

    Raises:
        UserError: the operation names experts that do not exist.
    """
    block.require_experts(operation.experts, operation.kind)
    token_gate = operation.shared_gate is None
    return CondensedMoE.make_empty(block.weights, len(operation.experts), token_gate, pair=block.pair)


def fill(layer: nn.Module, before: SparseBlock, operation: Condense) -> None:
    """Copy the retained rows of the previous block, and set the scales."""
    assert isinstance(layer, CondensedMoE)
    layer.fill(before.weights, operation.experts, operation.coefficients, operation.shared_gate)
