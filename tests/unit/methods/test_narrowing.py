"""The method that narrows experts: budgets, widths, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import EVERY, qwen2_moe, recorded, unchanged

from recondense.errors import UserError
from recondense.methods.narrowing import Narrowing
from recondense.methods.search import channel_scores
from recondense.methods.search.budget import Budget
from recondense.methods.step import SearchContext
from recondense.models import families, moe_blocks
from recondense.models.parameters import sizes
from recondense.operations import Narrow
from recondense.plan import Plan
from recondense.surgery import execute

CHANNEL = 3 * 32  # parameters of a channel of the tiny model


def search(model: Any, cache: dict[str, Any] | None = None, **settings: Any) -> tuple[list[Narrow], dict[str, Any]]:
    step = Narrowing(**{"width_multiple": 4, **settings})
    assert step.check(families.facts(model.config)) == []
    return step.search(SearchContext(model, lambda: recorded(model), {} if cache is None else cache, 1 << 30))


@pytest.mark.parametrize("score", ["heapr", "norms"])
@pytest.mark.parametrize(("allocation", "group"), [("uniform", 18), ("layer", 6), ("global", 1)])
@pytest.mark.parametrize(
    "budget", [Budget(memory_ratio=0.8), Budget(removed_expert_ratio=0.3)], ids=["memory", "routed"]
)
def test_a_budget_is_met_within_one_step(budget: Budget, allocation: str, group: int, score: str) -> None:
    model = qwen2_moe()
    before, limits = sizes(model), budget.settings()
    with unchanged(model):
        operations, record = search(model, budget=budget, allocation=allocation, score=score)
    execute.execute(model, Plan("tiny", tuple(operations)), lambda: recorded(model))
    after = sizes(model)
    if limits["memory_ratio"]:
        limit, reached = int(0.8 * before["total"]), after["total"]
    else:
        limit, reached = before["routed_experts"] - round(0.3 * before["routed_experts"]), after["routed_experts"]
    assert reached <= limit < reached + group * 4 * CHANNEL
    assert {layer: list(block.widths) for layer, block in moe_blocks.sparse_blocks(model).items()} == {
        int(layer): widths for layer, widths in record["widths"].items()
    }
    for layer, widths in record["widths"].items():  # a smaller share of the scores than of the channels
        share = 1 - sum(widths) / (6 * 16)
        assert record["removed_score"][layer] < share or share == record["removed_score"][layer] == 0


def test_a_width_instead_of_a_budget() -> None:
    operations, _ = search(qwen2_moe(), width=12)
    assert [operation.widths for operation in operations] == [(12,) * 6] * 3
    assert search(qwen2_moe(), width=16)[0] == []  # every expert is as wide already


def test_budgets_share_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do allocations: the cache has scores only."""
    model, cache = qwen2_moe(), {}
    narrow, _ = search(model, cache, budget=Budget(memory_ratio=0.7))
    monkeypatch.setattr(channel_scores, "loss_gradients", lambda *_: pytest.fail("computed again"))
    wide, _ = search(model, cache, budget=Budget(memory_ratio=0.85))
    for one, other in zip(narrow, wide, strict=True):  # a wider expert has all channels of a narrower one
        assert all(set(few) < set(many) for few, many in zip(one.channels, other.channels, strict=True))
    assert search(model, cache, budget=Budget(memory_ratio=0.85), allocation="global")[0] != wide


def test_out_of_reach_is_refused_before_anything_is_computed() -> None:
    context = SearchContext(qwen2_moe(), lambda: pytest.fail("recorded"), {}, 1 << 30)
    step = Narrowing(budget=Budget(removed_expert_ratio=0.9), width_multiple=4)
    with pytest.raises(UserError, match=r"width 4 for every expert reaches removed_expert_ratio=0\.75"):
        step.search(context)
    with pytest.raises(UserError, match="must be a multiple of 8 for a model in bfloat16"):
        Narrowing(width=12).outline(EVERY["olmoe"]().to(torch.bfloat16))


WRONG: dict[str, dict[str, Any]] = {
    "method.score=magnitude must be heapr or norms": {"score": "magnitude"},
    "method.allocation=each must be one of uniform, layer, global": {"allocation": "each"},
    "method.width=10 must be a multiple of 4": {"width": 10, "budget": Budget()},
    "method.width=8 and method.memory_ratio=0.5 are both set": {"width": 8},
    "method.width=8: needs method.allocation=uniform": {"width": 8, "budget": Budget(), "allocation": "layer"},
    "method.width_multiple=6 must be a multiple of 4, or auto": {"width_multiple": 6},
    "are both null": {"budget": Budget()},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_are_refused(message: str) -> None:
    with pytest.raises(UserError) as error:
        Narrowing(**{"budget": Budget(memory_ratio=0.5), **WRONG[message]})
    assert message in str(error.value)


def test_widths_above_that_of_the_experts_are_refused() -> None:
    facts = families.facts(qwen2_moe().config)
    [problem] = Narrowing(width=20).check(facts)
    assert problem == "method.width=20: must be at most 16, the width of an expert"
    [problem] = Narrowing(width_multiple=20, budget=Budget(memory_ratio=0.5)).check(facts)
    assert problem.startswith("method.width_multiple=20: must be at most 16")


def test_an_uneven_model_says_so_in_its_facts() -> None:
    """Methods that need one width refuse it by this, before its weights are read."""
    config = qwen2_moe().config
    shape = {"kind": "sparse", "num_experts": 6, "router_rows": 6}
    config.compressed_layers = {"1": {**shape, "expert_width": 8}}
    assert families.facts(config).uneven == (0, 1, 2)
    config.compressed_layers = {str(layer): {**shape, "expert_width": 8} for layer in range(3)}
    assert (families.facts(config).uneven, families.facts(config).expert_width) == ((), 8)
