"""Sets of experts to drop, with protected experts, against all sets by brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from support.tiny_models import qwen2_moe, recorded

from recondense.methods.search.expert_sets import search_expert_sets
from recondense.methods.search.genetic import GENETIC
from recondense.methods.search.layerwise import LayerwiseSearch
from recondense.methods.search.leave_out import LeaveOutScorer
from recondense.methods.step import SearchContext
from recondense.models import moe_blocks


@pytest.mark.parametrize("protected", [(), (0, 1), (0, 1, 2), (1, 3, 4, 5)])
@pytest.mark.parametrize("number", [3, 4])
def test_the_best_set_has_the_fewest_protected_experts(protected: tuple[int, ...], number: int) -> None:
    """Of all sets with as few of them as possible, it has the least error."""
    model = qwen2_moe()
    tape, blocks = recorded(model), {1: moe_blocks.sparse_blocks(model)[1]}
    context = SearchContext(model, lambda: tape, {}, 1 << 30, protected={1: frozenset(protected)})
    [(dropped, error)] = search_expert_sets(LayerwiseSearch(context), blocks, {1: number}, GENETIC, 0, "")[1]
    fewest = max(0, number - (6 - len(protected)))
    sets = [one for one in combinations(range(6), number) if len(set(one) & set(protected)) == fewest]
    chosen = torch.tensor([[expert in one for expert in range(6)] for one in sets])
    errors = LeaveOutScorer.prepare(model, tape, blocks[1], number, 1 << 30).errors(chosen).tolist()
    assert dropped == sets[errors.index(min(errors))] and error == pytest.approx(min(errors))
