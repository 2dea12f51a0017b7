"""Decide how many experts each layer loses: equally many, or fewer in important layers. Totals are met exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping

from recondense.errors import UserError


def drop_uniformly(total: int, num_experts: Mapping[int, int], floor: int) -> dict[int, int]:
    """Drop the same number of experts in every layer. If the total is not divisible, some layers lose one more.

    They are those that have the most experts, and among equals the first ones.

    Args:
        total: number of experts to drop in all layers together.
        num_experts: the current number of experts, by layer.
        floor: the fewest experts that a layer retains.

    Returns:
        The number of experts to drop, by layer.

    Raises:
        UserError: the layers cannot lose as many experts.
    """
    return _distribute(total, dict.fromkeys(num_experts, 1.0), num_experts, floor)


def drop_by_importance(
    total: int, importance: Mapping[int, float], num_experts: Mapping[int, int], floor: int
) -> dict[int, int]:
    """Drop fewer experts in important layers: the share of layer i is proportional to E_i / I_i.

    If a layer's share would leave fewer than `floor` experts, the other layers lose the difference. Shares are rounded
    down, and the remainder goes to the largest fractions; among equals, to the layers with the most experts, then to
    the lowest.

    Args:
        total, num_experts, floor: as in `drop_uniformly`.
        importance: I_i by layer, >= 0. A layer of importance 0 loses as many as possible before others lose any.

    Returns:
        The number of experts to drop, by layer.

    Raises:
        UserError: the layers cannot lose as many experts.

    Reference: MoE-I², arXiv 2411.01016, section 3.1; the paper gives no formula.
    """
    largest = max(importance.values(), default=1.0) or 1.0
    least = largest * 1e-12  # replaces 0
    shares = {layer: num_experts[layer] / max(importance[layer], least) for layer in num_experts}
    return _distribute(total, shares, num_experts, floor)


def _distribute(total: int, shares: Mapping[int, float], num_experts: Mapping[int, int], floor: int) -> dict[int, int]:
    room = {layer: max(0, count - floor) for layer, count in num_experts.items()}
    if total > sum(room.values()):
        raise UserError(
            f"{total} experts should be dropped, but the {len(room)} layers of {sorted(set(num_experts.values()))} "
            f"experts can lose at most {sum(room.values())}: each must retain {floor}"
        )
    exact: dict[int, float] = {}
    remaining, open_layers = float(total), set(room)
    while open_layers:  # first assign layers whose share exceeds what they can lose
        weight = sum(shares[layer] for layer in open_layers)
        full = {layer for layer in open_layers if remaining * shares[layer] / weight >= room[layer]}
        for layer in full or open_layers:
            exact[layer] = float(room[layer]) if full else remaining * shares[layer] / weight
        remaining -= sum(room[layer] for layer in full)
        open_layers = open_layers - full if full else set()
    numbers = {layer: min(room[layer], math.floor(exact[layer] + 1e-9)) for layer in room}
    by_fraction = sorted(room, key=lambda layer: (numbers[layer] - exact[layer], -num_experts[layer], layer))
    while (missing := total - sum(numbers.values())) > 0:
        for layer in [layer for layer in by_fraction if numbers[layer] < room[layer]][:missing]:
            numbers[layer] += 1
    assert sum(numbers.values()) == total
    return numbers
