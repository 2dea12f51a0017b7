"""Budgets against the sizes of models after surgery; CD-MoE condenses as few layers as meet a budget."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from support.tiny_models import EVERY, FAMILIES, condense_plan, recorded, unchanged

from recondense.methods.cdmoe import CDMoE
from recondense.methods.decompose import Decompose
from recondense.methods.merging import Merging
from recondense.methods.moei2 import InterExpertPruning
from recondense.methods.mone import MoNE
from recondense.methods.naee import NAEE
from recondense.methods.narrowing import Narrowing
from recondense.methods.saliency import SaliencyPruning
from recondense.methods.search.budget import Budget
from recondense.methods.step import SearchContext
from recondense.models import moe_blocks, parameters
from recondense.models.parameters import count_parameters, routed_parameters
from recondense.operations import Prune
from recondense.plan import Plan
from recondense.surgery import execute

EXPERT = 3 * 32 * 16  # gate, up and down of one expert of the tiny models
ROW = 32


def size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def drop(model: Any, total: int) -> None:
    """Drop `total` experts of a model with six in every MoE layer: at most four of a layer, the first layers first."""
    plan = []
    for layer in moe_blocks.sparse_blocks(model):
        number = min(4, total)
        total -= number
        plan += [Prune(layer, tuple(range(number, 6)))] if number else []
    assert total == 0
    execute.execute(model, Plan("tiny", tuple(plan)))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_counts(family: str) -> None:
    model = FAMILIES[family]()
    layers = len(moe_blocks.sparse_blocks(model))
    assert count_parameters(model) == size(model) == parameters.parameter_counts(model.config).total
    assert routed_parameters(model) == layers * 6 * EXPERT
    execute.execute(model, condense_plan(model, [1]))  # two of its routed experts are retained
    assert routed_parameters(model) == (layers - 1) * 6 * EXPERT + 2 * EXPERT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.95, 0.9, 0.85, 0.8])
def test_memory_ratio_drops_the_fewest_experts_that_keep_it(family: str, ratio: float) -> None:
    budget, original = Budget(memory_ratio=ratio), size(FAMILIES[family]())
    total = budget.experts_to_drop(FAMILIES[family]())
    sizes = []
    for number in (total, total - 1):
        model = FAMILIES[family]()
        drop(model, number)
        sizes.append(size(model))
        assert budget.experts_to_drop(model) == total - number  # of a model that has already lost some
    assert sizes[0] <= ratio * original < sizes[1]
    assert sizes[1] - sizes[0] == EXPERT + ROW
    # Merging keeps the rows of the router, so as many or more experts have to be removed.
    least = -(-(original - math.floor(ratio * original)) // EXPERT)
    assert budget.experts_to_drop(FAMILIES[family](), router_rows=False) == least >= total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.34, 0.5])
def test_removed_expert_ratio_counts_routed_experts_only(family: str, ratio: float) -> None:
    model, budget = FAMILIES[family](), Budget(removed_expert_ratio=ratio)
    experts = 6 * len(moe_blocks.sparse_blocks(model))
    assert budget.experts_to_drop(model) == round(ratio * experts)
    assert budget.expert_parameters_to_remove(model) == round(ratio * experts * EXPERT)
    drop(model, 1)
    assert budget.experts_to_drop(model) == max(0, round(ratio * experts) - 1)
    assert budget.expert_parameters_to_remove(model) == max(0, round(ratio * experts * EXPERT) - EXPERT)


def test_problems() -> None:
    assert "both null" in Budget().problems()[0] and Budget().problems(required=False) == []
    for value in (0, 1, -0.5, 1.5, True, "half"):
        assert "between 0 and 1" in Budget(memory_ratio=value).problems()[0]  # type: ignore[arg-type]


def test_two_ratios() -> None:
    """Giving both is a problem, with the same message everywhere."""
    both = {"removed_expert_ratio": 0.5, "memory_ratio": 0.7}
    problems = Budget(**both).problems()
    assert problems == ["method.removed_expert_ratio and method.memory_ratio are both set; set one of them to null"]
    for step in (CDMoE, InterExpertPruning, NAEE, Decompose):
        with pytest.raises(ValueError, match=f"^{problems[0]}$"):
            step(budget=Budget(**both))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "setting",
    # Two layers of qwen2_moe meet 0.76585 only because the gates of their shared experts are removed too.
    [("memory_ratio", 0.95), ("memory_ratio", 0.8), ("memory_ratio", 0.76585), ("removed_expert_ratio", 0.4)],
)
def test_cdmoe_condenses_the_fewest_layers(family: str, setting: tuple[str, float]) -> None:
    name, ratio = setting
    model, cache = FAMILIES[family](), {}  # type: ignore[var-annotated]
    original, experts = size(model), routed_parameters(model)
    with unchanged(model):
        operations, record = CDMoE(num_experts=2, budget=Budget(**{name: ratio})).search(
            SearchContext(model, lambda: recorded(model), cache, 1 << 30)
        )
    assert record[name] == ratio
    reached = []
    for plan in (operations, operations[:-1]):
        other = FAMILIES[family]()
        execute.execute(other, Plan("tiny", tuple(plan)))
        memory_ratio = size(other) / original  # the scale, a buffer that export folds, does not count
        reached.append(
            memory_ratio <= ratio if name == "memory_ratio" else 1 - routed_parameters(other) / experts >= ratio
        )
    assert reached == [True, False]
    # With the same cache, the number of layers that meets the budget gives the same layers without another search, and
    # the budget gives back further experts of their orders.
    alone, again = CDMoE(num_experts=2, num_layers=len(operations)).search(
        SearchContext(model, lambda: pytest.fail("taped again"), cache, 1 << 30)
    )
    assert again["reused"] and [operation.layer for operation in alone] == [operation.layer for operation in operations]
    assert all(longer.experts[:2] == short.experts for short, longer in zip(alone, operations, strict=True))


@pytest.mark.parametrize(
    ("name", "family", "least"), [("memory_ratio", "qwen2_moe", 0), ("removed_expert_ratio", "mixtral", 1)]
)
@pytest.mark.parametrize("num_experts", [2, 5])
def test_cdmoe_names_what_it_can_reach(name: str, family: str, least: int, num_experts: int) -> None:
    """The ratio that the message names can be reached, and none that is 0.0002 stricter."""
    model = EVERY[family]()
    strict = 0.05 if name == "memory_ratio" else 0.95

    def search(ratio: float) -> Any:
        step = CDMoE(num_experts=num_experts, budget=Budget(**{name: ratio}))
        return step.search(SearchContext(model, lambda: recorded(model), cache, 1 << 30))

    cache: dict[str, Any] = {}
    with pytest.raises(ValueError, match=rf"strictest possible budget is {name}=") as error:
        search(strict)
    reported = re.search(rf"strictest possible budget is {name}=(\d\.\d+|\d)", str(error.value))
    assert reported is not None
    best = float(reported[1])
    assert [len(operation.experts) for operation in search(best)[0]] == [least] * 3
    with pytest.raises(ValueError, match="strictest possible budget"):
        search(best - 2e-4 if name == "memory_ratio" else best + 2e-4)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_cdmoe_condenses_to_fewer_experts_if_all_layers_do_not_meet_the_budget(family: str) -> None:
    """Layers that retain six of six experts remove none."""
    model = EVERY[family]()
    layers, cache = len(moe_blocks.sparse_blocks(model)), {}  # type: ignore[var-annotated]
    for ratio in (0.2, 0.8):
        step = CDMoE(num_experts=6, budget=Budget(removed_expert_ratio=ratio))
        operations, _ = step.search(SearchContext(model, lambda: recorded(model), cache, 1 << 30))
        retained = [len(operation.experts) for operation in operations]
        assert sum(retained) + 6 * (layers - len(retained)) == math.floor((1 - ratio) * 6 * layers)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize(("name", "ratio"), [("memory_ratio", 0.0), ("removed_expert_ratio", 12 / 18)])
def test_budgets_in_whole_experts_count_experts_that_a_step_has_narrowed(family: str, name: str, ratio: float) -> None:
    """Half as wide: the budget is met to within one expert of this width in every layer."""
    model = EVERY[family]()
    total = size(model)
    execute.restructure(model, Plan("tiny", tuple(Narrowing(width=8).outline(model))))
    expert = 3 * 32 * 8 + (2 * 8 + 32 if family == "gpt_oss" else 0)
    assert parameters.present_expert(model) == expert
    if name == "memory_ratio":  # six of the experts
        ratio = (size(model) - 5.5 * (expert + ROW)) / total
    budget = Budget(**{name: ratio})
    need, count = budget.expert_parameters_to_remove(model), size if name == "memory_ratio" else routed_parameters
    before, row = count(model), (ROW + (family == "gpt_oss")) * (name == "memory_ratio")
    assert need > 3 * (expert + row)
    for step, unit in (
        *((NAEE(budget=budget), expert + row), (SaliencyPruning("frequency", budget=budget), expert + row)),
        (InterExpertPruning(0.66, budget=budget), expert + row),
        *((Merging("router_logits", budget=budget), expert), (MoNE(budget=budget), expert - 32)),
    ):
        originals = execute.restructure(model, Plan("tiny", tuple(step.outline(model))))
        saved = before - count(model)
        for layer, block in originals.items():
            moe_blocks.set_block(model, layer, block)
        over = saved - need
        assert -unit < over <= 0 if isinstance(step, InterExpertPruning) else 0 <= over < 3 * unit, step
