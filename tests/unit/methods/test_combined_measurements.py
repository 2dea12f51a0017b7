"""The combined search keeps its best measurement and spends its budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support.step_search import search
from support.tiny_models import qwen2_moe, recorded

from recondense.methods.combined import Combined
from recondense.methods.search.budget import Budget
from recondense.methods.search.damage import Damage
from recondense.methods.search.genetic import Genetic
from recondense.models import moe_blocks
from recondense.models.parameters import sizes
from recondense.operations import Factorize
from recondense.plan import Plan
from recondense.surgery import execute

RANK_STEP = 3 * (32 + 16)  # parameters of an additional rank of one expert of the small models
COMBINED: dict[str, Any] = {"num_experts": (2,), "prune_ratios": (0.34,), "kept_ratios": (), "width_ratios": ()}
COMBINED |= {"genetic": Genetic(population=20, parents=5, iterations=4)}


def test_combined_keeps_its_best_measurement() -> None:
    """The last measurement chooses something worse than the choice around which it measures."""
    model = qwen2_moe(2)
    tape = recorded(model)
    operations, record = search(Combined(**COMBINED, measurements=3, budget=Budget(memory_ratio=0.8)), model)
    damages = [entry["damage"] for entry in record["measurements"]]
    best = min(range(3), key=damages.__getitem__)
    assert damages[0] > damages[best] < damages[-1]
    assert record["chosen"] == record["measurements"][best]["choice"] != record["measurements"][-1]["choice"]
    originals = execute.execute(model, Plan("tiny", tuple(operations)))
    compressed = {layer: moe_blocks.get_block(model, layer) for layer in originals}
    with moe_blocks.swap_blocks(model, originals):
        measured = Damage(model, tape).replace(compressed)
    assert measured == pytest.approx(damages[best], rel=1e-4)


def test_combined_spends_the_rest_of_its_budget_on_ranks() -> None:
    """What remains of the budget is less than one rank of one expert in every factorized layer."""
    model = qwen2_moe()
    settings = {
        **COMBINED,
        "num_experts": (),
        "kept_ratios": (0.5,),
        "budget": Budget(memory_ratio=0.85),
        "measurements": 1,
    }
    operations, _ = search(Combined(**settings), model)
    budget = math.floor(0.85 * sizes(model)["total"])
    execute.execute(model, Plan("tiny", tuple(operations)))
    factorized = sum(isinstance(operation, Factorize) for operation in operations)
    assert factorized and 0 <= budget - sizes(model)["total"] < factorized * RANK_STEP
