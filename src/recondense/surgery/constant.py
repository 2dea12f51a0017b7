"""Replace routed experts by constants: the means of their outputs (MoNE, arXiv 2507.00390)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recondense.calibration.trace import LayerTrace
from recondense.errors import UserError
from recondense.models import moe_blocks
from recondense.models.constant_experts import add_constants
from recondense.models.moe_blocks import SparseBlock
from recondense.models.replacement_blocks import RemappedRouter, expert_outputs
from recondense.operations import Constant


def restructure(block: SparseBlock, operation: Constant) -> nn.Module:
    """Make a block with the retained experts and a constant for each of the others, not yet filled.

    The router keeps all its rows, so a token that selects a constant gets it times its routing weight.

    Raises:
        UserError: the operation names experts that do not exist; or the experts are factorized, merged or constants.
    """
    block.require_experts(operation.retained, operation.kind)
    weights = block.weights  # raises for factorized experts and constants
    if isinstance(block.router, RemappedRouter):
        raise UserError(f"plan: constant, layer {block.layer}: its experts are already merged")
    constants = replaced_experts(block, operation)
    if not constants:
        raise UserError(f"plan: constant, layer {block.layer}: the plan retains all {block.num_experts} experts")
    order = [*operation.retained, *constants]
    places = [order.index(expert) for expert in range(block.num_experts)]
    table = torch.tensor(places, device=weights.down_EDF.device)
    with torch.no_grad():
        experts = block.select_experts(operation.retained)
        constants_CD = weights.down_EDF.new_zeros(len(constants), weights.down_EDF.shape[1])
    router = RemappedRouter(block.router, table)
    return moe_blocks.replace_parts(block.module, router=router, experts=add_constants(experts, constants_CD))


@torch.no_grad()
def fill(after: nn.Module, before: SparseBlock, operation: Constant, traces: Sequence[LayerTrace]) -> None:
    """Compute the constants: each expert's mean output over the calibration tokens that select it, summed in fp64.

    The constant of an expert that no token selects is 0, as in the authors' code.

    Args:
        after: the block of `restructure`.
        before: the previous block.
        operation: the operation.
        traces: the traces of the layer on the calibration set.
    """
    constants_CD: Tensor = after.experts.constants  # type: ignore[union-attr, assignment]
    for place, expert in enumerate(replaced_experts(before, operation)):
        sum_D, count = torch.zeros_like(constants_CD[place], dtype=torch.float64), 0
        for trace in traces:
            x_tD = trace.x_TD[(trace.top_k_index_TK == expert).any(dim=1)]
            sum_D += expert_outputs(x_tD, before.weights, [expert])[0].double().sum(dim=0)
            count += len(x_tD)
        constants_CD[place].copy_(sum_D / max(count, 1))


def replaced_experts(block: SparseBlock, operation: Constant) -> list[int]:
    """Return the experts that become constants, in the order of the constants."""
    return [expert for expert in range(block.num_experts) if expert not in operation.retained]
