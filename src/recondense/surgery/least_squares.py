"""Ridge least squares for the linear parts of a block, by normal equations that are summed over text batches.

Legend: T tokens, t tokens of a unit, D hidden size, n inputs of a unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from recondense.models import moe_blocks
from recondense.models.tensor_store import TensorList

SWEEPS = 3  # passes over the units of a layer if they are too many to be solved together
FITTED_SHARE = 0.75  # of the tokens of a text batch: with ridge="auto", the others choose the ridge
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # that "auto" chooses from


@dataclass(frozen=True)
class Unit:
    """One linear part of a block.

    Args:
        weight_Dn: the weights of the unit, which are changed in place.
        features: maps x_TD to the rows of the unit's tokens and their features H (t, n), fp32.
    """

    weight_Dn: Tensor
    features: Callable[[Tensor], tuple[Tensor, Tensor]]


def solve(
    block: nn.Module,
    units: Sequence[Unit],
    inputs: TensorList,
    targets: TensorList,
    residuals: TensorList,
    ridge: float | Literal["auto"],
    columns: int,
) -> None:
    """Add the ridge solution for the residual to the weights: min ‖R − HΔᵀ‖² + λ‖Δ‖².

    Args:
        block: the block of the layer.
        units: the linear parts of the block.
        inputs: the inputs of the block (T, D), per text batch.
        targets: the targets of the block (T, D), per text batch.
        residuals: an empty list for the residuals.
        ridge: λ, relative to the mean diagonal of the normal matrix, or "auto".
        columns: the maximum number of columns that are solved together.
    """
    for x_TD, target_TD in zip(inputs, targets, strict=True):
        residuals.append(target_TD - moe_blocks.block_output(block(x_TD[None]))[0].float())
    if sum(unit.weight_Dn.shape[1] for unit in units) <= columns:
        _solve_together(units, inputs, residuals, ridge)
        return
    parts = [part for unit in units for part in _split(unit, columns)]
    for _ in range(SWEEPS):
        for part in parts:
            _solve_together([part], inputs, residuals, ridge)


def _split(unit: Unit, columns: int) -> list[Unit]:
    """Split a unit into units of at most `columns` columns with the same tokens."""

    def select(part: slice) -> Unit:
        def features(x_TD: Tensor) -> tuple[Tensor, Tensor]:
            rows, h_tn = unit.features(x_TD)
            return rows, h_tn[:, part]

        return Unit(unit.weight_Dn[:, part], features)

    width = unit.weight_Dn.shape[1]
    return [select(slice(first, first + columns)) for first in range(0, width, columns)] if width > columns else [unit]


def _solve_together(
    units: Sequence[Unit], inputs: TensorList, residuals: TensorList, ridge: float | Literal["auto"]
) -> None:
    """Solve one ridge problem for some units, and update the residuals.

    With "auto", the ridge is the one of RIDGES whose solution for the first tokens of each text batch has the smallest
    error on the others. If every solution has a larger error than no change, nothing is changed.
    """
    widths = [unit.weight_Dn.shape[1] for unit in units]
    weight_Dn = units[0].weight_Dn
    gram = torch.zeros(sum(widths), sum(widths), dtype=torch.float64, device=weight_Dn.device)
    right = torch.zeros(sum(widths), weight_Dn.shape[0], dtype=torch.float64, device=weight_Dn.device)

    def rows(start: float, end: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features and residuals of a share of each text batch, and add them to the normal equations."""
        for x_TD, residual_TD in zip(inputs, residuals, strict=True):
            part = slice(math.ceil(start * len(x_TD)), math.ceil(end * len(x_TD)))
            h_tn, residual_tD = _stack_features(units, widths, x_TD[part]), residual_TD[part]
            gram.add_(h_tn.T @ h_tn)  # accumulated in fp64
            right.add_(h_tn.T @ residual_tD)
            yield h_tn, residual_tD

    for _ in rows(0.0, FITTED_SHARE if ridge == "auto" else 1.0):
        pass
    if ridge == "auto":
        solutions = {choice: _ridge_solution(gram, right, choice) for choice in RIDGES}
        errors: dict[float, float] = dict.fromkeys((math.inf, *RIDGES), 0.0)
        for h_tn, residual_tD in rows(FITTED_SHARE, 1.0):
            errors[math.inf] += float(residual_tD.double().square().sum())  # without a change
            for choice, delta_nD in solutions.items():
                errors[choice] += float((residual_tD - h_tn @ delta_nD).double().square().sum())
        chosen = min(errors, key=errors.__getitem__)
        if chosen == math.inf:
            return
    else:
        chosen = ridge
    delta_nD = _ridge_solution(gram, right, chosen)
    for unit, change_nD in zip(units, delta_nD.split(widths), strict=True):
        old_Dn = unit.weight_Dn.clone()
        unit.weight_Dn.add_(change_nD.T.to(old_Dn.dtype))
        change_nD.copy_((unit.weight_Dn.float() - old_Dn.float()).T)  # the change as rounded by the weights' dtype
    for index, x_TD in enumerate(inputs):
        residuals[index] = residuals[index] - _stack_features(units, widths, x_TD) @ delta_nD


def _ridge_solution(gram: Tensor, right_nD: Tensor, ridge: float) -> Tensor:
    """Solve (HᵀH + λ) Δ = HᵀR."""
    diagonal = gram.diagonal().clone()
    gram.diagonal().add_(ridge * float(diagonal.mean()) + 1e-30)
    solution_nD = torch.linalg.solve(gram, right_nD).float()
    gram.diagonal().copy_(diagonal)
    return solution_nD


def _stack_features(units: Sequence[Unit], widths: Sequence[int], x_TD: Tensor) -> Tensor:
    """Concatenate the features of some units (T, Σn), fp32; they are zero for tokens that do not reach a unit."""
    h_Tn = x_TD.new_zeros(len(x_TD), sum(widths), dtype=torch.float32)
    for unit, part in zip(units, h_Tn.split(list(widths), dim=1), strict=True):
        rows, features_tn = unit.features(x_TD)
        part[rows] = features_tn
    return h_Tn
