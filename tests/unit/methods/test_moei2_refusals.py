"""What MoE-I² and the methods beside it refuse, and layers that it does not search."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.tiny_models import condense_plan, deepseek_v2, qwen2_moe, recorded

from recondense.methods.combined import Combined
from recondense.methods.decompose import Decompose
from recondense.methods.moei2 import InterExpertPruning
from recondense.methods.naee import NAEE
from recondense.methods.saliency import SaliencyPruning
from recondense.methods.search.budget import Budget
from recondense.methods.search.genetic import Genetic, best_sets
from recondense.methods.step import SearchContext
from recondense.models import families, moe_blocks
from recondense.operations import Merge
from recondense.plan import Plan
from recondense.surgery import execute


def test_an_exact_search_of_too_many_sets_is_refused() -> None:
    with pytest.raises(ValueError, match=r"5\.32e\+13 sets of 15 of 60 experts"):
        best_sets(lambda dropped_PE: dropped_PE.sum(dim=1), 60, 15, Genetic(search="exact"), 0)


def test_layers_that_cannot_be_searched() -> None:
    """Condensed layers have nothing to prune, merged experts cannot be dropped alone, and a norm may be zero."""
    model = qwen2_moe()
    step = InterExpertPruning(prune_ratio=0.34, genetic=Genetic(population=10, iterations=4, parents=4))
    merged = Merge(1, ((0, 1), (2,), (3,), (4,), (5,)), ((0.5, 0.5), (1.0,), (1.0,), (1.0,), (1.0,)))
    originals = execute.execute(model, Plan("tiny", (merged,)))
    with pytest.raises(ValueError, match="layer 1: its experts are merged"):
        step.search(SearchContext(model, lambda: recorded(model), {}, 1 << 30))
    for layer, block in originals.items():
        moe_blocks.set_block(model, layer, block)
    execute.execute(model, condense_plan(model, [0, 1, 2]))
    for method in (
        step,
        SaliencyPruning("reap", budget=Budget(removed_expert_ratio=0.3)),
        NAEE(budget=Budget(removed_expert_ratio=0.3)),
        Decompose(),
    ):
        assert method.search(SearchContext(model, lambda: recorded(model), {}, 1 << 30))[0] == []
    model = qwen2_moe()
    torch.nn.init.zeros_(moe_blocks.sparse_blocks(model)[1].weights.down_EDF)
    torch.nn.init.zeros_(model.model.layers[1].mlp.shared_expert.down_proj.weight)
    operations, record = step.search(SearchContext(model, lambda: recorded(model), {}, 1 << 30))
    assert record["expert_importance"]["1"] == [0.0] * 6 and operations


def test_invalid_settings_are_refused() -> None:
    facts = families.facts(qwen2_moe().config)
    assert "at most 0.6667" in InterExpertPruning(prune_ratio=0.8).check(facts)[0]
    grouped = families.facts(deepseek_v2(n_group=2, topk_method="group_limited_greedy").config)
    assert "groups" in InterExpertPruning().check(grouped)[0]
    facts = families.facts(qwen2_moe(hidden_size=64, moe_intermediate_size=64).config)
    assert not Decompose(average_rank=31).check(facts)
    assert "below 32" in Decompose(average_rank=32).check(facts)[0]
    assert "auto (19)" in Decompose(rank_multiple=24).check(facts)[0]
    assert "at most 8" in Combined(rank_multiple=16, budget=Budget(memory_ratio=0.5)).check(facts)[0]
    assert "rank_multiple=8" in Decompose(average_rank=4, rank_multiple=8).check(facts)[0]
    assert "rank_multiple=64" in Decompose(rank_multiple=64, budget=Budget(memory_ratio=0.5)).check(facts)[0]
    with pytest.raises(ValueError, match="both null"):
        Decompose(average_rank=None, required=True)
    assert "combinations" in InterExpertPruning(num_candidates=200, block_size=6).check(facts)[0]
    assert "none of the 18" in InterExpertPruning(prune_ratio=0.01).check(facts)[0]
    with pytest.raises(ValueError, match="both set"):
        InterExpertPruning(budget=Budget(memory_ratio=0.5, removed_expert_ratio=0.5))
    with pytest.raises(ValueError, match=r"below method\.population=20"):
        InterExpertPruning(genetic=Genetic(population=20, parents=20))
    with pytest.raises(ValueError, match="parents") as error:
        InterExpertPruning(prune_ratio=1.5, importance="size", block_size=0, genetic=Genetic(parents=200, search="all"))
    assert len(str(error.value).splitlines()) == 5
    with pytest.raises(ValueError, match="between 0 and 1"):
        Decompose(budget=Budget(memory_ratio=1.5))


def test_an_exact_search_of_too_many_sets_is_refused_before_it_starts() -> None:
    facts = dataclasses.replace(families.facts(qwen2_moe().config), num_experts=60, top_k=4)
    step = InterExpertPruning(genetic=Genetic(search="exact"))
    [problem] = step.check(facts)
    assert "5.32e+13 sets of 15 of 60" in problem  # 60! / (15! 45!)
    assert step.check(dataclasses.replace(facts, num_experts=16)) == []
    assert any(
        "sets of 30 of 60" in text
        for text in NAEE(budget=Budget(removed_expert_ratio=0.5), genetic=Genetic(search="exact")).check(facts)
    )


def test_importances_under_grouped_routing_are_refused_before_they_are_measured() -> None:
    facts = families.facts(deepseek_v2(n_group=2, topk_group=1, topk_method="group_limited_greedy").config)
    [problem] = Decompose(budget=Budget(removed_expert_ratio=0.5)).check(facts)
    assert "2 groups" in problem and "method.alpha=0" in problem
    assert Decompose(alpha=0, budget=Budget(removed_expert_ratio=0.5)).check(facts) == []
