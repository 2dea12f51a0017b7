"""The rest of a budget is used up, by the sizes of the outline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import EVERY

from recondense.methods.combined import Combined
from recondense.methods.search.budget import Budget
from recondense.models import families, model_classes, parameters
from recondense.models.parameters import sizes
from recondense.operations import Narrow
from recondense.run.sizes import outlined

NARROW: dict[str, Any] = {"num_experts": (), "prune_ratios": (), "kept_ratios": (), "width_ratios": (0.5,)}
OPTIONS = (NARROW, {**NARROW, "prune_ratios": (0.34,), "width_ratios": (0.75, 0.5)})


@pytest.mark.parametrize(("family", "changes"), [("qwen2_moe", {"moe_intermediate_size": 20}), ("gpt_oss", {})])
@pytest.mark.parametrize("ratio", ["memory_ratio", "removed_expert_ratio"])
@pytest.mark.parametrize("options", OPTIONS, ids=["narrow", "prune and narrow"])
def test_narrowed_layers_use_up_a_budget(
    family: str, changes: dict[str, Any], ratio: str, options: dict[str, Any]
) -> None:
    """Never above it, and less than an expert below it, with widths that are no multiples and with biases."""
    model = model_classes.on_meta(EVERY[family](**changes).config, torch.float32)
    counts, full = parameters.parameter_counts(model.config), families.facts(model.config).expert_width
    name, unit = (
        ("total", counts.expert + counts.router_row) if "memory" in ratio else ("routed_experts", counts.expert)
    )
    before, met = sizes(model)[name], 0
    lowest = 1 if name == "routed_experts" else 300
    for thousandths in range(lowest, 1000, 9):
        budget = Budget(**{ratio: thousandths / 1000})
        step = Combined(budget=budget, width_multiple=8, **options)
        need = budget.expert_parameters_to_remove(model)
        try:
            with outlined(model, [step]) as operations:
                saved = before - sizes(model)[name]
        except ValueError as error:
            assert "requires more than" in str(error)
            continue
        met += 1
        assert need <= saved < need + unit, thousandths
        widths = {width for operation in operations if isinstance(operation, Narrow) for width in operation.widths}
        assert widths <= {8, 16, full}, thousandths
    assert met > 20
