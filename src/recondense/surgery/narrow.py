"""Narrow routed experts: remove rows of gate and up projections and columns of down projections."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from recondense.calibration.moments import inner_moments
from recondense.calibration.trace import LayerTrace
from recondense.models import moe_blocks
from recondense.models.moe_blocks import SparseBlock
from recondense.models.narrowing import narrow_experts
from recondense.operations import Narrow


def restructure(block: SparseBlock, operation: Narrow, traces: Sequence[LayerTrace] | None = None) -> nn.Module:
    """Make the narrow block with its weights, which are copies of rows and columns of the previous block's tensors.

    Args:
        block: the layer.
        operation: the channels that each expert retains.
        traces: the traces of the layer on the calibration set, with which down projections are solved for by least
            squares; None copies their columns.

    Raises:
        UserError: the operation is for another number of experts or names channels that do not exist, or the experts
            are factorized or have different widths.
    """
    moment = None if traces is None else inner_moments(block.weights, traces)
    return moe_blocks.replace_parts(block.module, experts=narrow_experts(block, operation.channels, moment))
