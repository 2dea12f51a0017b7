"""How many experts each layer loses: the same everywhere, or fewer where experts matter more. Totals are exact."""

from __future__ import annotations

import math
from collections.abc import Mapping

from recondense.errors import UserError


def uniform(total: int, num_experts: Mapping[int, int], floor: int) -> dict[int, int]:
    """The same number from every layer; the first layers lose the remainder, one each.

    Args:
        total: experts to drop in all layers together.
        num_experts: of each layer now.
        floor: the fewest that a layer may retain.

    Returns:
        layer -> number to drop.

    Raises:
        UserError: the layers cannot lose so many.
    """
    return _spread(total, dict.fromkeys(num_experts, 1.0), num_experts, floor)


def inverse_importance(
    total: int, importance: Mapping[int, float], num_experts: Mapping[int, int], floor: int
) -> dict[int, int]:
    """Important layers lose fewer: the share of layer i is proportional to E_i / I_i.

    Shares are rounded down, a layer never falls below the floor, what it cannot lose the others do, and remainders go
    to the largest fractions (to the lowest layer among equals).

    Args:
        total, num_experts, floor: as in `uniform`.
        importance: I_i of each layer, >= 0; a layer of importance 0 loses all that it may before others lose any.

    Raises:
        UserError: the layers cannot lose so many.

    Reference: MoE-I², arXiv 2411.01016, section 3.1; the paper gives no formula.
    """
    largest = max(importance.values(), default=1.0) or 1.0
    least = largest * 1e-12  # stands for 0
    shares = {layer: num_experts[layer] / max(importance[layer], least) for layer in num_experts}
    return _spread(total, shares, num_experts, floor)


def _spread(total: int, shares: Mapping[int, float], num_experts: Mapping[int, int], floor: int) -> dict[int, int]:
    room = {layer: max(0, count - floor) for layer, count in num_experts.items()}
    if total > sum(room.values()):
        raise UserError(
            f"{total} experts are to be dropped, but {len(room)} layers of {sorted(set(num_experts.values()))} experts "
            f"can lose {sum(room.values())} at most: each must retain {floor}"
        )
    exact: dict[int, float] = {}
    left, open_layers = float(total), set(room)
    while open_layers:  # layers that would lose more than they can are filled first
        weight = sum(shares[layer] for layer in open_layers)
        over = {layer for layer in open_layers if left * shares[layer] / weight >= room[layer]}
        for layer in over or open_layers:
            exact[layer] = float(room[layer]) if over else left * shares[layer] / weight
        left -= sum(room[layer] for layer in over)
        open_layers = open_layers - over if over else set()
    found = {layer: min(room[layer], math.floor(exact[layer] + 1e-9)) for layer in room}
    by_fraction = sorted(room, key=lambda layer: (found[layer] - exact[layer], layer))
    while (missing := total - sum(found.values())) > 0:
        for layer in [layer for layer in by_fraction if found[layer] < room[layer]][:missing]:
            found[layer] += 1
    assert sum(found.values()) == total
    return found
