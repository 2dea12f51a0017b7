"""The protocol of steps, and the example of a method in CONTRIBUTING."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from support.searched import BUDGETS, METHODS, steps_of
from support.tiny_models import qwen2_moe, recorded

from recondense.methods.combined import Combined
from recondense.methods.dropping import Dropping
from recondense.methods.search.budget import Budget
from recondense.methods.step import SearchContext, Step
from recondense.models import families, moe_blocks
from recondense.run.build_steps import build_steps
from recondense.run.sizes import compare

MEMBERS = sorted(name for name in vars(Step) if not name.startswith("_"))


@pytest.mark.parametrize("method", METHODS)
def test_every_step_implements_the_protocol(method: str) -> None:
    for step in steps_of(method)[0]:
        assert [name for name in MEMBERS if not hasattr(step, name)] == []


def test_steps_say_what_they_do_to_a_model() -> None:
    """So that no other module needs to know their classes."""
    properties = ("condenses", "removes_layers", "needs_whole_experts")
    values = {
        type(step).__name__: tuple(getattr(type(step), name) for name in properties)
        for method in METHODS
        for step in steps_of(method)[0]
    }
    others = {name: kind for name, kind in values.items() if kind != (False, False, True)}
    assert others == {
        "CDMoE": (True, False, True),
        Combined.__name__: (True, False, True),
        Dropping.__name__: (False, True, False),
    }


# Settings of rounds that the small models can make, if not those of the other tests.
ROUNDS: dict[str, list[str]] = {
    "cdmoe": ["method.num_experts=2", "method.num_layers=2"],
    "cdmoe_s": ["method.num_layers=[2,0,1]"],
    "layer_drop": ["method.memory_ratio=0.5"],
    "block_drop": ["method.memory_ratio=0.5"],
    "narrow": ["method.width=8", "method.width_multiple=4"],
    "moei2": ["method.prune_ratio=0.34", "method.memory_ratio=0.7"],
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("method", [method for method in METHODS if any(s.repeatable for s in steps_of(method)[0])])
def test_rounds_remove_as_much_as_one_round(method: str, count: int) -> None:
    """From shapes: every round removes about its share, and together they remove what the method removes at once."""
    steps, _ = steps_of(method, *ROUNDS.get(method, BUDGETS[method]))
    model = qwen2_moe(num_hidden_layers=4)
    at_once = compare(model, steps)
    parts: list[Any] = []
    removed = []
    for number in range(1, count + 1):
        for step in steps:
            part = step.for_round(number, count, model) if step.repeatable else step if number == count else None
            parts += [] if part is None else [part]
        sizes = compare(model, parts)
        removed.append(sizes.before.total - sizes.after.total)
    tolerance = 3 * (32 + 16) * 4 if method == "moei2" else 3 * 32 * 16 if method == "cdmoe_moei2" else 0
    assert abs(removed[-1] - (at_once.before.total - at_once.after.total)) <= tolerance
    if not any(step.left_open or step.condenses or step.removes_layers for step in steps):
        experts, widths = ([getattr(s, name) for s in sizes.layers.values()] for name in ("experts_after", "widths"))
        assert experts == [layer.experts_after for layer in at_once.layers.values()]
        assert widths == [layer.widths for layer in at_once.layers.values()]
        expert = 3 * 32 * 16 + 32  # with its row of the router; a step of narrow is a quarter of 24 experts
        shares = [number * removed[-1] / count for number in range(1, count + 1)]
        step_of = expert * 6 if method == "narrow" else expert
        assert all(abs(was - share) <= step_of for was, share in zip(removed, shares, strict=True))


def test_the_example_in_contributing_is_a_method(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is built from the settings of its YAML, and its outline gives the sizes."""
    blocks = re.findall(r"```python\n(.*?)```", (root / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    [code] = [block for block in blocks if "class WeightNorm" in block]
    module: Any = types.ModuleType("recondense.methods.weight_norm")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(code, vars(module))
    settings = {"name": "weight_norm", "removed_expert_ratio": 0.34, "memory_ratio": None, "refit": False}
    [step] = build_steps({**settings, "_target_": f"{module.__name__}.WeightNorm"})
    assert step == module.WeightNorm(budget=Budget(0.34))
    model = qwen2_moe()
    assert step.check(families.facts(model.config)) == []
    operations, record = step.search(SearchContext(model, lambda: recorded(model), {}, 1 << 30))
    for operation in operations:
        weights = moe_blocks.sparse_blocks(model)[operation.layer].weights.down_EDF
        order = weights.flatten(1).norm(dim=1).argsort().tolist()
        assert operation.retained == tuple(sorted(order[2:]))
        assert len(record["norms"][str(operation.layer)]) == 6
    sizes = compare(model, [step])
    assert sizes.after.routed_experts == sizes.before.routed_experts * 4 // 6 and len(operations) == 3
