"""Surgery does: it executes a Plan on a model and never decides. One operation, one file.

`restructure` makes the shapes from the plan alone (on the meta device too); `fill` computes the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from recondense import families
from recondense.plan import Operation, Plan
from recondense.surgery import condense

__all__ = ["apply", "fill", "restructure"]


def restructure(model: PreTrainedModel, plan: Plan) -> dict[int, nn.Module]:
    """Put unfilled blocks of the plan's shapes in place of the original ones.

    Args:
        model: changed in place; may lie on the meta device.
        plan: what to do.

    Returns:
        the original blocks by decoder-layer index.

    Raises:
        ValueError: an operation on a layer that is not sparse (any more), or on experts that do not exist.
    """
    originals: dict[int, nn.Module] = {}
    try:
        for operation in plan.operations:
            _restructure_one(model, operation, originals)
    except ValueError:  # leave no model with unfilled blocks behind
        for layer, module in originals.items():
            families.set_block(model, layer, module)
        raise
    families.without_router_loss(model)
    return originals


def _restructure_one(model: PreTrainedModel, operation: Operation, originals: dict[int, nn.Module]) -> None:
    blocks = families.sparse_blocks(model)
    if operation.layer not in blocks:
        raise ValueError(
            f"plan: {operation.kind} layer {operation.layer}, but the sparse MoE layers are {sorted(blocks)}"
        )
    block = blocks[operation.layer]
    missing = [expert for expert in operation.experts if expert >= block.num_experts]
    if missing:
        raise ValueError(
            f"plan: layer {operation.layer} has {block.num_experts} routed experts; the plan retains {missing}"
        )
    originals[operation.layer] = block.module
    families.set_block(model, operation.layer, condense.restructure(block, operation))


def fill(model: PreTrainedModel, plan: Plan, originals: Mapping[int, nn.Module]) -> None:
    """Compute the weights of restructured blocks from the original ones."""
    for operation in plan.operations:
        original = families.sparse_view(model, operation.layer, originals[operation.layer])
        condense.fill(families.get_block(model, operation.layer), original, operation)


def apply(model: PreTrainedModel, plan: Plan) -> dict[int, nn.Module]:
    """`restructure`, then `fill`; returns the original blocks, for a teacher to keep or the caller to drop."""
    originals = restructure(model, plan)
    fill(model, plan, originals)
    return originals
