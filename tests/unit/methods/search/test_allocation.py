"""Allocations meet their total exactly, whatever the importances."""

from __future__ import annotations

import random

import pytest

from recondense.methods.search.allocation import drop_by_importance, drop_uniformly


@pytest.mark.parametrize("seed", range(30))
def test_total_floor_and_order(seed: int) -> None:
    draw = random.Random(seed)
    layers = draw.randrange(1, 30)
    experts = {layer: draw.choice((8, 60, 64)) if seed % 2 else 64 for layer in range(layers)}
    floor = draw.randrange(1, 7)
    most = sum(count - floor for count in experts.values())
    total = draw.randrange(0, most + 1)
    importance = {
        layer: draw.choice((0.0, 300.0 ** draw.random())) if seed % 3 else 1 + 299.0 * layer for layer in experts
    }
    for dropped in (drop_by_importance(total, importance, experts, floor), drop_uniformly(total, experts, floor)):
        assert sum(dropped.values()) == total
        assert all(0 <= dropped[layer] <= experts[layer] - floor for layer in experts)
    dropped = drop_by_importance(total, importance, experts, floor)
    for one in experts:
        for other in experts:
            if experts[one] == experts[other] and importance[one] < importance[other]:
                assert dropped[one] >= dropped[other]


def test_equally_important_layers_lose_equally() -> None:
    assert drop_by_importance(6 * 16, dict.fromkeys(range(6), 3.7), dict.fromkeys(range(6), 64), 6) == dict.fromkeys(
        range(6), 16
    )


def test_an_allocation_by_hand() -> None:
    """Shares of 12 by 1/I = 1, 1/2, 1/4: 6.86, 3.43, 1.71; the largest fractions are those of layers 0 and 2."""
    assert drop_by_importance(12, {0: 1.0, 1: 2.0, 2: 4.0}, dict.fromkeys(range(3), 16), 4) == {0: 7, 1: 3, 2: 2}
    # Layer 0 can lose 5 only; the other 7 are divided 2 : 1.
    assert drop_by_importance(12, {0: 1.0, 1: 2.0, 2: 4.0}, {0: 9, 1: 9, 2: 9}, 4) == {0: 5, 1: 5, 2: 2}
    assert drop_uniformly(7, dict.fromkeys(range(3), 16), 4) == {0: 3, 1: 2, 2: 2}


def test_too_many_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"37 experts.*at most 36.*retain 4"):
        drop_by_importance(37, dict.fromkeys(range(3), 1.0), dict.fromkeys(range(3), 16), 4)
