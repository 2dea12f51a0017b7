"""One option a layer, least damage for what must be saved: the multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recondense.errors import UserError

CELLS = 20_000  # what must be saved is counted in so many units; each layer's saving is rounded down to a whole one


def least_damage(saved: Sequence[Sequence[int]], damage: Sequence[Sequence[float]], need: int) -> list[int]:
    """The options that together save enough at the least sum of damages.

    minimise `Σ_i damage[i][o_i]` subject to `Σ_i saved[i][o_i] >= need`, by dynamic programming over units of need /
    CELLS: at the optimum no exchange of options lowers the damage per parameter saved. Rounding down never lets a
    choice save less than `need`; it may miss one that saves less than a unit a layer above it.

    Args:
        saved, damage: for each layer, of each of its options.
        need: parameters.

    Returns:
        the index of each layer's option; ties go to the earlier option.

    Raises:
        UserError: the most that can be saved is less than `need`.
    """
    most = sum(max(each) for each in saved)
    if most < need:
        raise UserError(f"{need:,} parameters are to be saved, but these options save at most {most:,}")
    if need <= 0:
        return [min(range(len(each)), key=lambda option: (each[option], option)) for each in damage]
    unit = max(1, need // CELLS)
    target = -(-need // unit)
    # least[u]: the least damage of the layers so far that save at least u units
    least = np.full(target + 1, np.inf)
    least[0] = 0.0
    choices = []
    for savings, damages in zip(saved, damage, strict=True):
        best, choice = np.full(target + 1, np.inf), np.zeros(target + 1, dtype=np.int64)
        for option, (saving, value) in enumerate(zip(savings, damages, strict=True)):
            units = min(saving // unit, target)
            reached = np.concatenate([np.full(units, least[0]), least[: target + 1 - units]]) + value
            better = reached < best
            best[better], choice[better] = reached[better], option
        least = best
        choices.append(choice)
    if not np.isfinite(least[target]):  # within the rounding of the most that can be saved
        return [max(range(len(each)), key=lambda option: (each[option], -option)) for each in saved]
    found, left = [], target
    for savings, choice in zip(reversed(saved), reversed(choices), strict=True):
        option = int(choice[left])
        found.append(option)
        left = max(0, left - min(savings[option] // unit, target))
    return found[::-1]
