"""The refits that the setting `method.refit` adds to a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recondense.operations import Condense, Drop, Operation, Refit

RIDGE = 1e-2  # of coefficients: regularization towards the current ones, relative to the mean of the diagonal


def plan_refits(operations: Sequence[Operation], refit: bool | str) -> list[Refit]:
    """Return a refit for every layer that operations change but do not drop, in ascending order.

    Args:
        operations: operations of the plan.
        refit: value of `method.refit`: false, true (down_proj), or coefficients (only of condensed layers).
    """
    if not refit:
        return []
    dropped = {operation.layer for operation in operations if isinstance(operation, Drop)}
    condensed = {operation.layer for operation in operations if isinstance(operation, Condense)}
    layers = condensed if refit == "coefficients" else {operation.layer for operation in operations}
    target: Any = "coefficients" if refit == "coefficients" else "down_proj"
    ridge: Any = RIDGE if refit == "coefficients" else "auto"
    return [Refit(layer, target, ridge) for layer in sorted(layers - dropped)]
