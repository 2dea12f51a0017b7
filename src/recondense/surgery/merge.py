"""Merge groups of routed experts into their weighted means (MC-SMoE, arXiv 2310.01334, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from recondense.errors import UserError
from recondense.models import views
from recondense.models.replacement_blocks import MoEWeights, RemappedRouter
from recondense.models.views import SparseBlock
from recondense.operations import PROJECTIONS, Merge


def restructure(block: SparseBlock, operation: Merge) -> nn.Module:
    """A block with one expert a group, for now with the weights of the group's first. The router keeps all its rows.

    A token that selects two experts of a group goes through the merged expert with the sum of their weights.

    Raises:
        UserError: the groups divide another number of experts; factorized or merged experts.
    """
    num_grouped = sum(len(group) for group in operation.groups)
    if num_grouped != block.num_experts or isinstance(block.router, RemappedRouter):
        merged = ", merged already" if isinstance(block.router, RemappedRouter) else ""
        raise UserError(
            f"plan: merge layer {operation.layer}: it has {block.num_experts} routed experts{merged}; the groups part "
            f"{num_grouped}"
        )
    assert block.weights is not None  # raises for factorized experts
    table = [0] * block.num_experts
    for position, group in enumerate(operation.groups):
        for expert in group:
            table[expert] = position
    with torch.no_grad():
        experts = block.select_experts([group[0] for group in operation.groups])
    device = block.weights.down_EDF.device
    router = RemappedRouter(block.router, torch.tensor(table, device=device))
    return views.replace_parts(block.module, router=router, experts=experts)


@torch.no_grad()
def fill(merged: SparseBlock, before: SparseBlock, operation: Merge) -> None:
    """Write the weighted mean of each group, summed in fp32."""
    weights, target = before.weights, merged.weights
    for position, (group, shares) in enumerate(zip(operation.groups, operation.weights, strict=True)):
        first = _expert_tensors(weights, group[0])
        sums = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in first.items()}
        for expert, share in zip(group, shares, strict=True):
            tensors = _expert_tensors(weights, expert)
            if operation.align and expert != group[0]:
                tensors = align(first, tensors)
            for name, tensor in tensors.items():
                sums[name].add_(tensor.float(), alpha=share)
        for name, tensor in _expert_tensors(target, position).items():
            tensor.copy_(sums[name])


def _expert_tensors(weights: MoEWeights, expert: int) -> dict[str, Tensor]:
    """Weights and biases of an expert by name; views."""
    biases = {f"{name}_bias": bias[expert] for name, bias in weights.biases().items()}
    return {**weights.projections(expert), **biases}


ROWS = {"gate_proj": 0, "up_proj": 0, "down_proj": 1, "gate_proj_bias": 0, "up_proj_bias": 0}  # where neurons lie


def align(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other expert with its F rows permuted so that they are most like the reference's.

    The permutation maximises the sum of inner products of gate rows, up rows and down columns (weight matching).

    Args:
        reference, other: gate_proj (F, D), up_proj (F, D), down_proj (D, F) of an expert, and its biases if it has any.

    Returns:
        The other's weights, permuted; they compute the same function.

    Reference: MC-SMoE, arXiv 2310.01334, section 3.1; Git Re-Basin, arXiv 2209.04836, section 3.2.
    """
    width = other["down_proj"].shape[1]
    gain_FF = torch.zeros(width, width, dtype=torch.float64)
    for name in PROJECTIONS:
        mine, theirs = (expert[name].movedim(ROWS[name], 0).double() for expert in (reference, other))
        gain_FF += (mine @ theirs.T).cpu()
    _, order = linear_sum_assignment(gain_FF.numpy(), maximize=True)
    index = torch.as_tensor(order, device=other["down_proj"].device)
    return {name: tensor.index_select(ROWS[name], index) if name in ROWS else tensor for name, tensor in other.items()}
