"""Merge groups of routed experts into their weighted means (MC-SMoE, arXiv 2310.01334, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recondense import families
from recondense.errors import UserError
from recondense.families import SparseBlock
from recondense.modules import MoEWeights, RemappedRouter
from recondense.plan import Merge
from recondense.surgery.alignment import aligned


def restructure(block: SparseBlock, operation: Merge) -> nn.Module:
    """A block of one expert a group, holding that of each group's first expert; the router keeps all its rows.

    A token that selects two experts of a group passes its merged expert with the sum of their weights.

    Raises:
        UserError: the groups part another number of experts; factorized or merged experts.
    """
    named = sum(len(group) for group in operation.groups)
    if named != block.num_experts or isinstance(block.router, RemappedRouter):
        merged = ", merged already" if isinstance(block.router, RemappedRouter) else ""
        raise UserError(
            f"plan: merge layer {operation.layer}: it has {block.num_experts} routed experts{merged}; the groups part "
            f"{named}"
        )
    assert block.weights is not None  # whole experts, or its error
    table = [0] * block.num_experts
    for position, group in enumerate(operation.groups):
        for expert in group:
            table[expert] = position
    with torch.no_grad():
        experts = block.chosen_experts([group[0] for group in operation.groups])
    device = block.weights.down_EDF.device
    router = RemappedRouter(block.router, torch.tensor(table, device=device))
    return families.with_parts(block.module, router=router, experts=experts)


@torch.no_grad()
def fill(merged: SparseBlock, before: SparseBlock, operation: Merge) -> None:
    """The weighted means, summed in fp32."""
    weights, target = before.weights, merged.weights
    for position, (group, shares) in enumerate(zip(operation.groups, operation.weights, strict=True)):
        first = _expert(weights, group[0])
        sums = {name: torch.zeros_like(each, dtype=torch.float32) for name, each in first.items()}
        for expert, share in zip(group, shares, strict=True):
            own = _expert(weights, expert)
            if operation.align and expert != group[0]:
                own = aligned(first, own)
            for name, each in own.items():
                sums[name].add_(each.float(), alpha=share)
        for name, each in _expert(target, position).items():
            each.copy_(sums[name])


def _expert(weights: MoEWeights, expert: int) -> dict[str, Tensor]:
    """Weights and biases of an expert by name; views."""
    biases = {f"{name}_bias": bias[expert] for name, bias in weights.biases().items()}
    return {**weights.projections(expert), **biases}
