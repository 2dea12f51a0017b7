"""NAEE against an enumeration with transformers' blocks."""

from __future__ import annotations

import itertools

import pytest
from support.brute_force_moei2 import change
from support.step_search import search
from support.tiny_models import FAMILIES, recorded

from recondense.methods.naee import NAEE
from recondense.methods.search.budget import Budget


@pytest.mark.parametrize("family", FAMILIES)
def test_naee_drops_the_best_set_of_an_enumeration(family: str) -> None:
    model = FAMILIES[family]()
    operations, _ = search(NAEE(budget=Budget(removed_expert_ratio=0.5)), model)
    tape = recorded(model)
    for operation in operations:
        sets = list(itertools.combinations(range(6), 3))
        best = min(sets, key=lambda experts: change(model, tape, operation.layer, experts))
        assert set(operation.retained) == set(range(6)) - set(best)
