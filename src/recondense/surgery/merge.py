"""Merge groups of routed experts into their weighted means (MC-SMoE, arXiv 2310.01334, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from recondense.errors import UserError
from recondense.models import moe_blocks
from recondense.models.moe_blocks import SparseBlock
from recondense.models.replacement_blocks import MoEWeights, RemappedRouter
from recondense.operations import PROJECTIONS, Merge


def restructure(block: SparseBlock, operation: Merge) -> nn.Module:
    """Make a block with one expert per group, which at first has the weights of the group's first expert.

    The router keeps all its rows. If a token selects two experts of a group, the merged expert counts twice, with the
    sum of both routing weights.

    Raises:
        UserError: the groups are for another number of experts, or the experts are already factorized or merged.
    """
    num_grouped = sum(len(group) for group in operation.groups)
    if num_grouped != block.num_experts or isinstance(block.router, RemappedRouter):
        merged = ", which are already merged" if isinstance(block.router, RemappedRouter) else ""
        raise UserError(
            f"plan: merge, layer {operation.layer}: the groups have {num_grouped} experts, but the layer has "
            f"{block.num_experts} routed experts{merged}"
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
    return moe_blocks.replace_parts(block.module, router=router, experts=experts)


@torch.no_grad()
def fill(merged: SparseBlock, before: SparseBlock, operation: Merge) -> None:
    """Compute the weighted mean of each group, summed in fp32, and write it to the merged block."""
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
    """Return views of the weights and biases of an expert, by name."""
    biases = {f"{name}_bias": bias[expert] for name, bias in weights.biases().items()}
    return {**weights.projections(expert), **biases}


ROWS = {"gate_proj": 0, "up_proj": 0, "down_proj": 1, "gate_proj_bias": 0, "up_proj_bias": 0}  # dimension of neurons


def align(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Permute the neurons of an expert so that they match those of a reference expert as well as possible.

    The permutation maximizes the sum of inner products of gate rows, up rows and down columns (weight matching).

    Args:
        reference, other: gate_proj (F, D), up_proj (F, D) and down_proj (D, F) of an expert, and any biases.

    Returns:
        The permuted weights of `other`, which compute the same function.

    Reference: MC-SMoE, arXiv 2310.01334, section 3.1; Git Re-Basin, arXiv 2209.04836, section 3.2.
    """
    width = other["down_proj"].shape[1]
    gain_FF = torch.zeros(width, width, dtype=torch.float64)
    for name in PROJECTIONS:
        reference_FD, other_FD = (expert[name].movedim(ROWS[name], 0).double() for expert in (reference, other))
        gain_FF += (reference_FD @ other_FD.T).cpu()
    _, order = linear_sum_assignment(gain_FF.numpy(), maximize=True)
    index = torch.as_tensor(order, device=other["down_proj"].device)
    return {name: tensor.index_select(ROWS[name], index) if name in ROWS else tensor for name, tensor in other.items()}
