"""The multiple-choice knapsack problem: one option per layer, with the least damage for the required savings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recondense.errors import UserError

CELLS = 20_000  # the need is divided into this many units; the saving of each layer is rounded down to entire units


def least_damage(saved: Sequence[Sequence[int]], damage: Sequence[Sequence[float]], need: int) -> list[int]:
    """Choose one option per layer so that together they save enough with the least sum of damages.

    minimize `Σ_i damage[i][o_i]` subject to `Σ_i saved[i][o_i] >= need`

    Solved by dynamic programming over units of need / CELLS parameters. Savings are rounded down, so a choice never
    saves less than `need`. The best choice may be missed if it exceeds `need` by less than one unit per layer.

    Args:
        saved: the parameters that each option of each layer saves.
        damage: the damage of each option of each layer.
        need: the number of parameters to save.

    Returns:
        The index of the option of each layer; among equals, the first one.

    Raises:
        UserError: all options together cannot save `need` parameters.
    """
    most = sum(map(max, saved))
    if most < need:
        raise UserError(f"{need:,} parameters must be saved, but the options save at most {most:,}")
    if need <= 0:
        return [min(range(len(damages)), key=lambda option: (damages[option], option)) for damages in damage]
    unit = max(1, need // CELLS)
    target = -(-need // unit)
    # least[u]: the least damage for which the layers so far save at least u units
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
    if not np.isfinite(least[target]):  # only because of the rounding: the options with the largest savings suffice
        return [max(range(len(savings)), key=lambda option: (savings[option], -option)) for savings in saved]
    options, remaining = [], target
    for savings, choice in zip(reversed(saved), reversed(choices), strict=True):
        option = int(choice[remaining])
        options.append(option)
        remaining = max(0, remaining - min(savings[option] // unit, target))
    return options[::-1]
