"""Both papers in one search: what is measured, what is chosen, and what is not measured twice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.tiny_models import qwen2_moe, recorded, unchanged

from recondense.methods.combined import Combined
from recondense.methods.search.budget import Budget
from recondense.methods.search.damage import Damage
from recondense.methods.search.genetic import Genetic
from recondense.methods.search.rerun import Change
from recondense.methods.step import SearchContext
from recondense.models import families, moe_blocks
from recondense.models.parameters import sizes
from recondense.operations import Condense, Factorize, Narrow, Prune
from recondense.plan import Plan
from recondense.surgery import execute

SETTINGS: dict[str, Any] = {"num_experts": (2,), "prune_ratios": (0.34,), "kept_ratios": (0.5,), "width_ratios": ()}
SETTINGS |= {"genetic": Genetic(population=20, parents=5, iterations=4)}


def search(
    model: Any, cache: dict[str, Any] | None = None, memory_ratio: float = 0.7, **changes: Any
) -> tuple[list[Any], dict[str, Any]]:
    step = Combined(budget=Budget(memory_ratio=memory_ratio), **{**SETTINGS, **changes})
    assert step.check(families.facts(model.config)) == []
    return step.search(SearchContext(model, lambda: recorded(model), {} if cache is None else cache, 1 << 30))


def test_the_first_measurement_is_the_enumerated_best() -> None:
    """Of all combinations of options that save enough, it has the least sum of damages of single layers."""
    model = qwen2_moe()
    with unchanged(model):
        operations, record = search(model, memory_ratio=0.75, measurements=1)
    [first] = record["measurements"]
    need = sizes(model)["total"] - int(0.75 * sizes(model)["total"])
    layers = list(record["options"])
    kinds = [range(len(record["options"][layer])) for layer in layers]
    allowed = [
        choice
        for choice in itertools.product(*kinds)
        if sum(record["options"][layer][place][1] for layer, place in zip(layers, choice, strict=True)) >= need
    ]

    def damage(choice: tuple[int, ...]) -> float:
        return sum(first["damages"][layer][place] for layer, place in zip(layers, choice, strict=True))

    best = min(allowed, key=damage)
    names = [record["options"][layer][place][0].partition(",")[0] for layer, place in zip(layers, best, strict=True)]
    assert [first["choice"][layer].partition(",")[0] for layer in layers] == names  # ranks may be raised afterwards
    assert first["damages"]["0"][0] == pytest.approx(0.0, abs=1e-9)
    execute.execute(model, Plan("tiny", tuple(operations)), lambda: recorded(model))
    assert sizes(model)["total"] <= int(0.75 * (sizes(qwen2_moe())["total"]))


def test_a_budget_out_of_reach_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the size that can be reached, and a search reaches it."""
    monkeypatch.setattr(Damage, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=r"strongest options of all layers reach memory_ratio=0\.") as error:
        search(qwen2_moe(), memory_ratio=0.05)
    monkeypatch.undo()
    model, best = qwen2_moe(), float(str(error.value).rpartition("=")[2])
    operations, _ = search(model, memory_ratio=best)
    execute.execute(model, Plan("tiny", tuple(operations)), lambda: recorded(model))
    assert sizes(model)["total"] <= best * sizes(qwen2_moe())["total"]


def test_the_damage_is_that_of_surgery() -> None:
    """The measured damage of a choice is that of the plan's operations."""
    model, expected = qwen2_moe(), qwen2_moe()
    operations, record = search(model, memory_ratio=0.8)
    tape = recorded(expected)
    measure = Damage(expected, tape)
    execute.execute(model, Plan("tiny", tuple(operations)), lambda: recorded(model))
    blocks = {layer: moe_blocks.get_block(model, layer) for layer in {operation.layer for operation in operations}}
    best = min(record["measurements"], key=lambda entry: entry["damage"])
    assert measure.replace(blocks) == pytest.approx(best["damage"], rel=1e-4)
    assert {type(operation) for operation in operations} <= {Condense, Prune, Narrow, Factorize}


def test_narrowing_is_an_option_and_is_measured_as_it_is_executed() -> None:
    """Alone and after pruning. The least squares of surgery see the same texts and the same routing."""
    model, expected = qwen2_moe(), qwen2_moe()
    only = {"num_experts": (), "prune_ratios": (0.34,), "kept_ratios": (), "width_ratios": (0.75, 0.5)}
    operations, record = search(model, memory_ratio=0.7, **only, width_multiple=4)
    assert [name for name, *_ in record["options"]["1"]] == [
        *("as it is", "narrowed to 12", "narrowed to 8"),
        *("pruned by 2", "pruned by 2 and narrowed to 12", "pruned by 2 and narrowed to 8"),
    ]
    kinds = [operation.kind for operation in operations]
    assert {"narrow", "prune"} == set(kinds) and kinds == sorted(kinds)  # narrowing sees the unchanged model
    measure = Damage(expected, recorded(expected))
    saved = sizes(model)["total"]
    execute.execute(model, Plan("tiny", tuple(operations)), lambda: recorded(model))
    blocks = {layer: moe_blocks.get_block(model, layer) for layer in {operation.layer for operation in operations}}
    best = min(record["measurements"], key=lambda entry: entry["damage"])
    assert measure.replace(blocks) == pytest.approx(best["damage"], rel=1e-4)
    named = {layer: {name: size for name, size, _ in options} for layer, options in record["options"].items()}
    saved -= sum(named[layer][name] for layer, name in record["chosen"].items())
    assert sizes(model)["total"] == saved


def test_another_budget_does_not_measure_single_layers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = Damage.measure

    def record_layers(self: Damage, changes: list[Change]) -> list[float]:
        measured.extend(start.layer for start in changes)
        return measure(self, changes)

    monkeypatch.setattr(Damage, "measure", record_layers)
    model, cache = qwen2_moe(), {}
    _, one = search(model, cache, memory_ratio=0.8, measurements=1)
    assert len(measured) == sum(len(options) for options in one["options"].values())
    measured.clear()
    _, other = search(model, cache, memory_ratio=0.7, measurements=1)
    assert not measured and other["measurements"][0]["damages"] == one["measurements"][0]["damages"]
    _, both = search(model, cache, memory_ratio=0.7, measurements=2)  # the second depends on the choice
    assert len(measured) == sum(len(options) for options in one["options"].values())
    assert both["measurements"][0]["damages"] == one["measurements"][0]["damages"] != both["measurements"][1]["damages"]


class Killed(Exception):
    """Ends a search."""


def test_a_killed_search_resumes_at_the_layer_of_its_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds after the first are cached under the choice around which they are measured."""
    measured: list[int] = []
    measure, remaining = Damage.measure, [5]

    def measure_until_killed(self: Damage, changes: list[Change]) -> list[float]:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise Killed
        measured.append(changes[0].layer)
        return measure(self, changes)

    monkeypatch.setattr(Damage, "measure", measure_until_killed)
    model, cache = qwen2_moe(), {}
    with pytest.raises(Killed):
        search(model, cache, memory_ratio=0.7, measurements=3)
    remaining[0] = 100
    resumed = search(model, cache, memory_ratio=0.7, measurements=3)
    assert measured[:6] == [0, 1, 2, 0, 1, 2], "the first round and two layers of the second were cached"
    choices = [entry["choice"] for entry in resumed[1]["measurements"]]
    assert len(measured) == (6 if choices[0] == choices[1] else 9)
    undisturbed = search(model, {}, memory_ratio=0.7, measurements=3)
    assert resumed[0] == undisturbed[0]
    for records in (resumed[1], undisturbed[1]):
        records.pop("seconds")
    assert resumed[1] == undisturbed[1]


def test_a_layer_that_cannot_be_condensed_keeps_its_other_options() -> None:
    """Its router selects the same two experts for every token, but three are to be retained."""
    model = qwen2_moe()
    router = moe_blocks.sparse_blocks(model)[1].router
    with torch.no_grad():
        router.weight.zero_()  # type: ignore[operator]
    operations, record = search(model, memory_ratio=0.8, num_experts=(3,))
    assert list(record["left_out"]) == ["1"] and "selects only 2 of 6 routed experts" in record["left_out"]["1"][0]
    assert not any(name.startswith("condensed") for name, *_ in record["options"]["1"])
    assert any(name.startswith("condensed") for name, *_ in record["options"]["0"]) and operations


def test_one_budget_decides() -> None:
    both = {"memory_ratio": 0.99, "removed_expert_ratio": 0.4}
    budget = Budget(removed_expert_ratio=0.4)
    with pytest.raises(ValueError, match="both set"):
        Combined(budget=Budget(**both))  # type: ignore[arg-type]
    model = qwen2_moe()
    before = sizes(model)["routed_experts"]
    step = Combined(**{**SETTINGS, "budget": budget})
    operations, _ = step.search(SearchContext(model, lambda: recorded(model), {}, 1 << 30))
    execute.execute(model, Plan("tiny", tuple(operations)), lambda: recorded(model))
    assert sizes(model)["routed_experts"] <= 0.6 * before


def test_invalid_settings_are_refused_together() -> None:
    with pytest.raises(ValueError, match="parents") as error:
        Combined(
            budget=Budget(memory_ratio=0.7),
            num_experts=(),
            prune_ratios=(),
            kept_ratios=(),
            width_ratios=(),
            measurements=0,
            alpha=-1,
            shared_gate="foo",
            expert_search="foo",
            genetic=Genetic(population=0, iterations=0),
        )
    assert len(str(error.value).splitlines()) == 8


@pytest.mark.parametrize("kind", ["auto", "genetic", "exact"])
def test_the_key_names_the_kind_of_search(kind: str) -> None:
    step = Combined(budget=Budget(memory_ratio=0.7), genetic=Genetic(search=kind))
    assert step.key()["search_kind"] == kind
