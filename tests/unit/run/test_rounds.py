"""The steps of each round, and what is refused, from shapes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import qwen2_moe

from recondense.methods.cdmoe import CDMoE
from recondense.methods.dropping import Dropping
from recondense.methods.narrowing import Narrowing
from recondense.methods.search.budget import Budget
from recondense.models import model_classes
from recondense.run.rounds import check_rounds, make_rounds, steps_of_rounds
from recondense.run.sizes import compare


def meta_model(**changes: Any) -> Any:
    return model_classes.on_meta(qwen2_moe(**changes).config, torch.float32)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75, 0.8, 0.99])
def test_rounds_condense_as_many_layers_as_one_round(ratio: float) -> None:
    """Earlier rounds give back no experts, as they could not take them again; the last one meets the budget."""
    model, steps = meta_model(num_hidden_layers=5), [CDMoE(2, budget=Budget(removed_expert_ratio=ratio))]
    once = compare(model, steps)
    layers = len(once.operations)
    for count in range(2, layers + 1):
        method = {"name": "cdmoe", "rounds": count}
        assert [*check_rounds(method, steps, model)] == []
        total = compare(model, steps_of_rounds(method, steps, model))
        assert total.after == once.after and len(total.operations) == layers
        first = compare(model, make_rounds(method, steps, model)[0].steps)
        assert len(first.operations) == layers // count
    [problem] = check_rounds({"name": "cdmoe", "rounds": layers + 1}, steps, model)
    assert problem.setting == "method.rounds" and "Use fewer rounds" in problem.text


def test_the_automatic_multiple_of_widths_is_that_of_the_original() -> None:
    """Experts of 640 channels have multiples of 64, but after the first round, they would have multiples of 32."""
    model = meta_model(moe_intermediate_size=640)
    steps = [Narrowing("norms", budget=Budget(removed_expert_ratio=0.54))]
    once, twice = (compare(model, steps_of_rounds({"rounds": count}, steps, model)) for count in (1, 2))
    assert once.after == twice.after and {layer.widths for layer in twice.layers.values()} == {(256, 256)}


def test_a_budget_that_one_round_cannot_meet_either_is_no_problem_of_the_rounds() -> None:
    [problem] = check_rounds({"rounds": 2}, [Dropping("moe", Budget(memory_ratio=0.05))], meta_model())
    assert problem.setting == "" and "more than dropping layers can save" in problem.text
