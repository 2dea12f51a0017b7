"""The refits that follow a method, by its setting `refit`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recondense.operations import Condense, Drop, Operation, Refit

RIDGE = 1e-2  # relative to the mean diagonal: a pull towards the weights as they are


def plan_refits(operations: Sequence[Operation], refit: bool | str) -> list[Refit]:
    """Return a refit of every layer that operations changed and left, lowest first.

    Args:
        refit: `method.refit`: false, true (down_proj), or coefficients (of condensed layers only).
    """
    if not refit:
        return []
    dropped = {operation.layer for operation in operations if isinstance(operation, Drop)}
    condensed = {operation.layer for operation in operations if isinstance(operation, Condense)}
    layers = condensed if refit == "coefficients" else {operation.layer for operation in operations}
    target: Any = "coefficients" if refit == "coefficients" else "down_proj"
    return [Refit(layer, target, RIDGE) for layer in sorted(layers - dropped)]
