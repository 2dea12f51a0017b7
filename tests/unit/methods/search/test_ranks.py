"""Ranks against the paper's formula, its published numbers, and the totals that they must meet."""

from __future__ import annotations

import random
from typing import Any

import pytest

from recondense.methods.search import ranks
from recondense.methods.search.allocation import drop_by_importance


def test_ranks_follow_the_formula() -> None:
    """Ranks are rounded down; the rest of the layer's total goes to the largest fractions, one rank each."""
    draw = random.Random(0)
    importance = [draw.uniform(1, 3) for _ in range(48)]
    total = sum((value + 1e-9) ** 0.15 for value in importance)
    exact = [(value + 1e-9) ** 0.15 / total * 512 * 48 for value in importance]
    allocated = ranks.allocate(importance, 512, 2048, 1408)
    remainder = 512 * 48 - sum(map(int, exact))
    raised = sorted(range(48), key=lambda j: int(exact[j]) - exact[j])[:remainder]
    assert remainder > 0 and allocated == [int(value) + (j in raised) for j, value in enumerate(exact)]
    assert sum(rank or 0 for rank in allocated) == 512 * 48
    assert min(rank or 0 for rank in allocated) < 490 < 530 < max(rank or 0 for rank in allocated)
    assert ranks.automatic_rank(2048, 1408) == 512
    assert ranks.allocate([2.0] * 48, 512, 2048, 1408) == [512] * 48


@pytest.mark.parametrize("shape", [(2048, 1408), (4096, 14336), (128, 64)])
@pytest.mark.parametrize("spread", [3.0, 300.0])
def test_multiples_meet_the_same_total(shape: tuple[int, int], spread: float) -> None:
    """Few different ranks, all within a step of the formula, and the total is used up."""
    average = ranks.automatic_rank(*shape)
    multiple = ranks.resolve_multiple("auto", *shape, average)
    assert multiple == {2048: 32, 4096: 64, 128: 1}[shape[0]]
    average -= average % multiple
    importance = [spread ** (j / 47) for j in range(48)]
    exact = ranks._exact(importance, average, *shape, 0.15, ranks.EPSILON)
    allocated = ranks.allocate(importance, average, *shape, multiple=multiple)
    assert [rank is None for rank in allocated] == [rank is None for rank in exact]
    near = [
        (rank, value) for rank, value in zip(allocated, exact, strict=True) if rank is not None and value is not None
    ]
    assert all(rank % multiple == 0 and abs(rank - value) < multiple for rank, value in near)
    spare = 48 * average * 3 * sum(shape) - ranks.parameters(allocated, *shape)
    assert spare == 0 if None not in allocated else 0 <= spare < multiple * 3 * sum(shape)
    assert len(set(allocated)) < 30


@pytest.mark.parametrize("seed", range(5))
def test_what_a_dense_expert_does_not_use_goes_to_the_others(seed: int) -> None:
    draw = random.Random(seed)
    importance = [300.0 ** draw.random() for _ in range(48)]
    allocated = ranks.allocate(importance, 700, 2048, 1408, alpha=0.5)
    cap = ranks.break_even(2048, 1408)
    assert None in allocated and all(rank is None or 1 <= rank < cap for rank in allocated)
    total, unit = ranks.parameters(allocated, 2048, 1408), 3 * (2048 + 1408)
    assert 0 <= 48 * 700 * unit - total < unit
    dense = [value for value, rank in zip(importance, allocated, strict=True) if rank is None]
    assert min(dense) >= max(value for value, rank in zip(importance, allocated, strict=True) if rank is not None)


def test_the_minimum_rank_counts_towards_the_total() -> None:
    """Importances so far apart that many ranks would be 0."""
    importance = [300.0 ** (j / 47) for j in range(48)]
    allocated = ranks.allocate(importance, 20, 2048, 1408, alpha=2)
    total, unit = ranks.parameters(allocated, 2048, 1408), 3 * (2048 + 1408)
    assert min(rank for rank in allocated if rank) == 1 and 0 <= 48 * 20 * unit - total < 48 * unit


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("retained", [0.1, 0.3333, 0.614, 0.97])
def test_a_budget_is_met_to_one_step(retained: float, multiple: int) -> None:
    draw = random.Random(1)
    importance = {layer: [300.0 ** draw.random() for _ in range(6 + layer)] for layer in range(4)}
    dense = ranks.parameters([None] * sum(map(len, importance.values())), 128, 64)
    average, by_layer = ranks.allocate_budget(importance, int(retained * dense), 128, 64, multiple=multiple)
    total = sum(ranks.parameters(allocated, 128, 64) for allocated in by_layer.values())
    assert 0 <= int(retained * dense) - total < multiple * 3 * (128 + 64)
    assert all(rank % multiple == 0 for allocated in by_layer.values() for rank in allocated if rank is not None)
    assert 1 <= average <= 43
    with pytest.raises(ValueError, match="with rank 1 they have"):
        ranks.allocate_budget(importance, 100, 128, 64)


@pytest.mark.parametrize(("average", "multiple"), [(16, "auto"), (100, "auto"), (512, "auto"), (16, 1)])
def test_the_multiple_suits_the_average_rank(average: int, multiple: Any) -> None:
    """Small averages get small multiples, so the total does not exceed the average."""
    resolved = ranks.resolve_multiple(multiple, 2048, 1408, average)
    allocated = ranks.allocate([1.0, 2.0, 3.0, 4.0], average, 2048, 1408, multiple=resolved)
    assert sum(rank or 0 for rank in allocated) <= 4 * average < sum(rank or 0 for rank in allocated) + resolved
    assert resolved <= max(1, average / 16)


@pytest.mark.parametrize("alpha", [0.15, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_experts_that_stay_dense_do_not_exceed_the_total(seed: int, alpha: float) -> None:
    """With importances of 0 among large ones, the other experts have too few ranks to make up for dense experts."""
    draw = random.Random(seed)
    importance = [draw.choice((0.0, draw.random())) for _ in range(12)]
    for average in (300, 512, 700):
        multiple = ranks.resolve_multiple("auto", 2048, 1408, average)
        allocated = ranks.allocate(importance, average, 2048, 1408, alpha, multiple)
        spare = 12 * average * 3 * (2048 + 1408) - ranks.parameters(allocated, 2048, 1408)
        assert 0 <= spare < multiple * 3 * (2048 + 1408)


# Pruning 25% and an average rank of R_a keep 0.75 · R_a · (D + F) / (D · F) of the parameters.
@pytest.mark.parametrize(
    ("layers", "experts", "top_k", "hidden", "width", "rank", "cut"),
    [(26, 64, 6, 2048, 1408, 512, 0.5398), (32, 8, 2, 4096, 14336, 2048, 0.5179)],
)
def test_published_cuts_from_the_shapes_alone(
    layers: int, experts: int, top_k: int, hidden: int, width: int, rank: int, cut: float
) -> None:
    """DeepSeek-V2-Lite and Mixtral (arXiv 2411.01016), with equal importances and with importances 300-fold apart."""
    total = round(0.25 * layers * experts)
    dense = 3 * hidden * width
    for spread in (1.0, 300.0):
        importance = {layer: spread ** (layer / (layers - 1)) for layer in range(layers)}
        numbers = drop_by_importance(total, importance, dict.fromkeys(importance, experts), top_k)
        assert sum(numbers.values()) == total
        remaining = 0
        for layer, number in numbers.items():
            importances = [importance[layer] * spread ** (j / experts) for j in range(experts - number)]
            multiple = ranks.resolve_multiple("auto", hidden, width, rank)
            remaining += ranks.parameters(
                ranks.allocate(importances, rank, hidden, width, multiple=multiple), hidden, width
            )
        assert 1 - remaining / (layers * experts * dense) == pytest.approx(cut, abs=1e-4)
