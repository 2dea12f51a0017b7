"""Every method keeps the super experts of a model, or the run says which of them it loses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from support.searched import BUDGETS, METHODS, steps_of
from support.super_expert import LAYER, with_super_expert
from support.tiny_models import EVERY, recorded

import recondense as rc
from recondense.methods.saliency import SaliencyPruning
from recondense.methods.search.budget import Budget
from recondense.methods.search.protection import SuperExperts, place_after
from recondense.models import moe_blocks, parameters
from recondense.operations import OPERATIONS, Condense, Constant, Drop, Factorize, Merge, Narrow, Prune, Refit
from recondense.plan import Plan
from recondense.report.tables import super_experts_line
from recondense.run import search as search_module
from recondense.run.super_experts import super_experts_of
from recondense.surgery import execute

LOSES = "the plan loses super experts"


def names(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "super expert" in message]


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"none"}))
def test_no_method_loses_a_super_expert_silently(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """With the default every method keeps it. Without protection the guard names what is lost, and only that."""
    model, expert = with_super_expert("qwen2_moe")
    tape = recorded(model)
    for protect in (True, False):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            plan = rc.search(tape, steps_of(method, *BUDGETS[method])[0], protect_super_experts=protect)
        record = plan.search["super_experts"]
        assert {layer: list(experts) for layer, experts in record["largest_outputs"].items()} == {"1": [str(expert)]}
        first, *warnings = names(caplog)
        assert f"1 super expert makes massive activations, without which the model is wrecked: layer {LAYER}" in first
        kept = place_after(LAYER, expert, plan.operations)[0] is not None
        assert not kept or protect or method not in ("frequency", "layer_drop", "mc_smoe"), "what this test is about"
        assert kept == (record["lost"] == {}) == (warnings == [])
        assert not protect or kept, "protected"
        if not kept:
            [warning] = warnings
            assert warning.startswith(LOSES) and warning.endswith(f"layer {LAYER}: {expert}")
            [(kind, lost)] = record["lost"].items()
            assert lost == {str(LAYER): [expert]} and kind in {operation.kind for operation in plan.operations}


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"none", "cdmoe_s", "svd_llm", "narrow"}))
def test_an_expert_that_a_method_would_lose_is_kept_if_it_is_protected(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One expert in one layer that the method changes, whichever it is, at the same sizes."""
    model = EVERY["qwen2_moe"](seed=3)
    without_narrow = ["method.width_ratios=[]"] if method == "cdmoe_moei2" else []  # which loses no expert
    tape, steps = recorded(model), steps_of(method, *BUDGETS[method], *without_narrow)[0]
    plan = rc.search(tape, steps)
    layer = plan.operations[0].layer
    expert = next(expert for expert in range(6) if place_after(layer, expert, plan.operations)[0] is None)
    super_experts = SuperExperts({layer: {expert: 1e3}})
    monkeypatch.setattr(search_module, "super_experts_of", lambda tape, cache: super_experts)
    protected = rc.search(tape, steps)
    assert protected.search["super_experts"]["lost"] == {} and protected.operations != plan.operations
    assert [operation.kind for operation in protected.operations] == [operation.kind for operation in plan.operations]
    sizes = []
    for searched in (plan, protected):
        originals = execute.execute(model, searched, lambda: recorded(model))
        sizes.append(parameters.sizes(model)["routed_experts"])
        for changed, block in originals.items():
            moe_blocks.set_block(model, changed, block)
    assert sizes[0] == sizes[1] or method == "cdmoe_moei2"  # which mixes other options


@pytest.mark.parametrize(
    ("method", "overrides", "kind"),
    [
        ("cdmoe_s", ["method.num_layers=all"], "condense"),
        ("layer_drop", ["method.removed_expert_ratio=0.99"], "drop"),
    ],
)
def test_what_a_budget_makes_a_method_lose_is_named(
    method: str, overrides: list[str], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, expert = with_super_expert("qwen2_moe")
    with caplog.at_level(logging.WARNING):
        plan = rc.search(recorded(model), steps_of(method, *overrides)[0])
    assert plan.search["super_experts"]["lost"] == {kind: {str(LAYER): [expert]}}
    assert [message for message in names(caplog) if message.startswith(LOSES)]
    line = super_experts_line(plan.search["super_experts"])
    assert line == f"layer {LAYER}: {expert}; LOST: layer {LAYER}: {expert} ({kind})"


def test_the_second_step_protects_it_under_its_new_index(caplog: pytest.LogCaptureFixture) -> None:
    model, expert = with_super_expert("qwen2_moe")
    first, second = (SaliencyPruning("frequency", budget=Budget(removed_expert_ratio=ratio)) for ratio in (0.34, 0.66))
    plan = rc.search(recorded(model), [first, second])
    assert place_after(LAYER, expert, plan.operations)[0] is not None
    assert len([operation for operation in plan.operations if operation.layer == LAYER]) == 2
    assert super_experts_line(plan.search["super_experts"]) == f"layer {LAYER}: {expert}, all kept"
    execute.execute(model, plan)


def test_a_model_without_super_experts_has_no_entry_and_the_cache_answers_again() -> None:
    model, expert = with_super_expert("qwen2_moe")
    cache: dict[str, Any] = {}
    assert list(super_experts_of(lambda: recorded(model), cache).outputs[LAYER]) == [expert]
    again = super_experts_of(lambda: pytest.fail("it is cached"), cache)
    assert again == super_experts_of(lambda: recorded(model), {})
    step = SaliencyPruning("reap", budget=Budget(removed_expert_ratio=0.34))
    assert "super_experts" not in rc.search(recorded(EVERY["qwen2_moe"]()), step).search


EXAMPLES = {
    "condense": (Condense(0, (4, 2), (0.5, 0.5)), {2: 1, 4: 0, 3: None}),
    "prune": (Prune(0, (1, 3, 4)), {3: 1, 4: 2, 0: None}),
    "constant": (Constant(0, (1, 3)), {3: 1, 0: None}),
    "narrow": (Narrow.from_channels(0, (range(4),) * 5), {1: 1}),
    "merge": (Merge(0, ((0, 1), (2,), (3, 4)), ((0.5, 0.5), (1.0,), (0.5, 0.5))), {2: 1, 0: None, 4: None}),
    "factorize": (Factorize(0, dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (4,) * 5)), {3: 3}),
    "drop": (Drop(0, "moe"), {0: None}),
    "refit": (Refit(0, "down_proj", 0.1), {4: 4}),
}


@pytest.mark.parametrize("kind", OPERATIONS)
def test_the_guard_knows_every_kind_of_operation(kind: str, tmp_path: Path) -> None:
    operation, places = EXAMPLES[kind]
    for expert, place in places.items():
        assert place_after(0, expert, [operation]) == (place, kind if place is None else "")
        assert place_after(1, expert, [operation]) == (expert, "")
    outputs = {0: dict.fromkeys(places, 500.0)}
    lost = [expert for expert, place in places.items() if place is None]
    assert SuperExperts(outputs).lost([operation]) == ({kind: {0: lost}} if lost else {})
    kept = frozenset(place for place in places.values() if place is not None)
    assert SuperExperts(outputs).protected([operation]) == ({0: kept} if kept else {})
    assert Plan("", (operation,)).operations[0].kind == kind
