"""Children of the genetic search."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from recondense.methods.search.genetic import Genetic, _children, best_sets


def test_children_are_drawn_from_both_parents() -> None:
    """Without mutation the children are all sets within the union, and no others."""
    children = _children([(0, 1), (2, 3)], 400, 12, 0.0, random.Random(0))
    assert set(children) == set(itertools.combinations(range(4), 2))


@pytest.mark.parametrize(("mutation", "least", "most"), [(0.0, 0, 0), (0.5, 430, 570), (1.0, 1000, 1000)])
def test_children_exchange_one_expert_with_the_given_probability(mutation: float, least: int, most: int) -> None:
    """A child of equal parents differs from them in one expert, or in none."""
    children = _children([(0, 1, 2), (0, 1, 2)], 1000, 12, mutation, random.Random(0))
    differing = [len({0, 1, 2} - {*child}) for child in children]
    assert set(differing) <= {0, 1} and least <= sum(differing) <= most
    assert all(len(set(child)) == 3 and set(child) <= set(range(12)) for child in children)


@pytest.mark.parametrize("mutation", [0.0, 1.0])
def test_only_mutation_brings_experts_that_no_parent_drops(mutation: float) -> None:
    evaluated: list[set[int]] = []

    def errors(dropped_PE: Tensor) -> Tensor:
        evaluated.append({int(expert) for expert in dropped_PE.any(dim=0).nonzero()})
        return dropped_PE.double() @ torch.arange(1.0, 41.0, dtype=torch.float64)

    best_sets(errors, 40, 2, Genetic(4, 10, 2, mutation, "genetic", memoise=False), 0)
    assert len(evaluated) == 10
    assert (set.union(*evaluated[1:]) <= evaluated[0]) == (mutation == 0.0)
