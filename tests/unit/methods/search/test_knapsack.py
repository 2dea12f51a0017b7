"""The knapsack against the enumeration of all choices."""

from __future__ import annotations

import itertools
import random

import pytest

from recondense.methods.search.knapsack import least_damage


@pytest.mark.parametrize("seed", range(20))
def test_least_damage_of_all_choices(seed: int) -> None:
    draw = random.Random(seed)
    saved = [[0, *(draw.randrange(1, 50) for _ in range(draw.randrange(1, 4)))] for _ in range(5)]
    damage = [[0.0, *(draw.random() for _ in options[1:])] for options in saved]
    need = draw.randrange(1, sum(max(options) for options in saved) + 1)
    enough = [
        choice
        for choice in itertools.product(*(range(len(options)) for options in saved))
        if sum(options[option] for options, option in zip(saved, choice, strict=True)) >= need
    ]

    def total(choice: tuple[int, ...] | list[int]) -> float:
        return sum(costs[option] for costs, option in zip(damage, choice, strict=True))

    best = least_damage(saved, damage, need)
    assert tuple(best) in enough
    assert total(best) == pytest.approx(min(total(choice) for choice in enough))


def test_large_counts_still_save_enough() -> None:
    saved = [[0, 10**9 + 7 * i, 2 * 10**9 + 3 * i] for i in range(24)]
    damage = [[0.0, 0.1 + 0.01 * i, 0.5 - 0.01 * i] for i in range(24)]
    for need in (1, 10**9, 24 * 10**9, sum(max(options) for options in saved)):
        choice = least_damage(saved, damage, need)
        assert sum(options[option] for options, option in zip(saved, choice, strict=True)) >= need


def test_saving_nothing_and_too_much() -> None:
    assert least_damage([[0, 5]], [[0.0, 0.1]], 0) == [0]
    with pytest.raises(ValueError, match="at most 5"):
        least_damage([[0, 5]], [[0.0, 0.1]], 6)
