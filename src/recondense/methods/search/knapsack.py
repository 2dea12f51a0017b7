"""The multiple-choice knapsack: one option a layer, with the least damage for the parameters that must be saved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recondense.errors import UserError

CELLS = 20_000  # units that the need is divided into; the saving of each layer is rounded down to whole units


def least_damage(saved: Sequence[Sequence[int]], damage: Sequence[Sequence[float]], need: int) -> list[int]:
    """Choose the options that together save enough at the least sum of damages.

    minimise `Σ_i damage[i][o_i]` subject to `Σ_i saved[i][o_i] >= need`

    Dynamic programming over units of need / CELLS. Savings are rounded down, so a choice never saves less than `need`.
    A choice that saves less than one unit a layer above `need` may be missed.

    Args:
        saved: parameters that each option of each layer saves.
        damage: the damage of each option of each layer.
        need: parameters to save.

    Returns:
        the index of each layer's option. The earlier option wins a tie.

    Raises:
        UserError: the strongest options save less than `need`.
    """
    most = sum(map(max, saved))
    if most < need:
        raise UserError(f"{need:,} parameters are to be saved, but these options save at most {most:,}")
    if need <= 0:
        return [min(range(len(damages)), key=lambda option: (damages[option], option)) for damages in damage]
    unit = max(1, need // CELLS)
    target = -(-need // unit)
    # least[u]: the least damage with which the layers so far save at least u units
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
        return [max(range(len(savings)), key=lambda option: (savings[option], -option)) for savings in saved]
    options, remaining = [], target
    for savings, choice in zip(reversed(saved), reversed(choices), strict=True):
        option = int(choice[remaining])
        options.append(option)
        remaining = max(0, remaining - min(savings[option] // unit, target))
    return options[::-1]
