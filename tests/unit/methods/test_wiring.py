"""That methods and surgery use what their parts find: the numbers, choices, ranks and factors reach the result."""

from __future__ import annotations

import itertools
import math
import random
from functools import partial
from typing import Any

import pytest
import torch
from support.brute_force_moei2 import best_of_block, loss_without
from support.tiny_models import FAMILIES, bits, qwen2_moe, recorded, same_bits, texts
from torch import Tensor

from recondense.methods import decompose, moei2
from recondense.methods.combined import Combined
from recondense.methods.decompose import Decompose
from recondense.methods.moei2 import InterExpertPruning
from recondense.methods.search.allocation import drop_by_importance
from recondense.methods.search.budget import Budget
from recondense.methods.search.damage import Damage
from recondense.methods.search.genetic import Genetic, _children, best_sets
from recondense.methods.step import SearchContext
from recondense.models import families, views
from recondense.models.parameters import sizes
from recondense.operations import Condense, Factorize, Operation, Prune, Refit
from recondense.plan import Plan
from recondense.surgery import apply
from recondense.surgery import refit as refit_module

FOUR = (0, 2, 3, 5)
NAMES = ("gate_proj", "up_proj", "down_proj")
RANK_STEP = 3 * (32 + 16)  # parameters of one rank more of one expert of the small models
COMBINED: dict[str, Any] = {"num_experts": (2,), "prune_ratios": (0.34,), "kept_ratios": ()}
COMBINED |= {"genetic": Genetic(population=20, parents=5, iterations=4)}


def search(step: Any, model: Any) -> tuple[list[Any], dict[str, Any]]:
    assert step.check(families.facts(model.config)) == []
    found: tuple[list[Any], dict[str, Any]] = step.search(SearchContext(model, lambda: recorded(model), {}, 1 << 30))
    return found


def numbers_dropped(model: Any, operations: list[Prune]) -> dict[int, int]:
    """How many experts the operations take from each sparse layer."""
    retained = {operation.layer: len(operation.retained) for operation in operations}
    blocks = views.sparse_blocks(model)
    return {layer: block.num_experts - retained.get(layer, block.num_experts) for layer, block in blocks.items()}


@pytest.mark.parametrize("seed", [1, 2])
def test_moei2_prunes_what_the_reception_field_chose(seed: int) -> None:
    """The plan drops the best of all combinations of candidates, which here is not each layer's own best."""
    model = qwen2_moe(seed, num_hidden_layers=2)
    operations, record = search(InterExpertPruning(prune_ratio=0.5), model)
    candidates = {int(layer): [tuple(each) for each, _ in sets] for layer, sets in record["candidates"].items()}
    layers = list(candidates)
    choice = best_of_block(model, [torch.tensor(text) for text in texts()], candidates, layers, {})
    assert any(choice)
    assert operations == [
        Prune.from_dropped(layer, 6, candidates[layer][place]) for layer, place in zip(layers, choice, strict=True)
    ]


def test_moei2_drops_fewer_experts_of_layers_that_matter_more() -> None:
    """Experts of one layer give outputs twice as large, those of another half as large."""
    model = qwen2_moe()
    scales = {0: 1.0, 1: 2.0, 2: 0.5}
    for layer, scale in scales.items():
        views.sparse_blocks(model)[layer].weights.down_EDF.data *= scale
    operations, record = search(InterExpertPruning(prune_ratio=0.34, normalize=False, num_candidates=1), model)
    importance = {int(layer): value for layer, value in record["layer_importance"].items()}
    order = sorted(importance, key=importance.__getitem__)
    assert order == sorted(scales, key=scales.__getitem__)
    dropped = numbers_dropped(model, operations)
    assert dropped[order[0]] > dropped[order[1]] > dropped[order[2]] and sum(dropped.values()) == 6


def test_moei2_allocates_by_inverse_importance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importances 2, 1 and 4: shares of 12 by 1/I are 3.43, 6.86 and 1.71."""
    by_layer = {0: 2.0, 1: 1.0, 2: 4.0}
    found = {layer: [value / 12] * 12 for layer, value in by_layer.items()}
    monkeypatch.setattr(moei2, "expert_importances", lambda *_: found)
    model = qwen2_moe(num_experts=12)
    operations, _ = search(InterExpertPruning(prune_ratio=12 / 36, num_candidates=1), model)
    assert numbers_dropped(model, operations) == {0: 3, 1: 7, 2: 2}


def test_moei2_takes_the_importance_that_was_asked_for() -> None:
    """lm_loss: what transformers' own loss rises by without each expert, and the numbers that follow from it."""
    model = qwen2_moe(3, num_hidden_layers=2)
    operations, record = search(InterExpertPruning(prune_ratio=0.34, importance="lm_loss", num_candidates=1), model)
    ids = [torch.tensor(text) for text in texts()]
    whole = loss_without(model, ids, {})
    lost = {
        layer: [max(0.0, loss_without(model, ids, {layer: [expert]}) - whole) for expert in range(6)]
        for layer in range(2)
    }
    for layer, values in lost.items():
        assert record["expert_importance"][str(layer)] == pytest.approx(values, abs=1e-4)
    expected = drop_by_importance(4, {layer: sum(values) for layer, values in lost.items()}, {0: 6, 1: 6}, 2)
    assert numbers_dropped(model, operations) == expected == {0: 1, 1: 3}
    by_output, _ = search(InterExpertPruning(prune_ratio=0.34, num_candidates=1), model)
    assert numbers_dropped(model, by_output) == {0: 2, 1: 2}


@pytest.mark.parametrize(
    "how", [{"average_rank": 6}, {"ratio": 0.5625}, {"budget": Budget(removed_expert_ratio=0.4375)}], ids=str
)
def test_ranks_follow_importances(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    """R_j = I_j^α / Σ I^α · R_a · M': roots 1, 2 and 1.5 of 9 give 4, 8 and 6 of 6 · 6. A rank keeps 144 of 1536."""
    by_layer = {0: [1.0, 4.0, 2.25] * 2, 1: [4.0, 4.0, 1.0, 1.0, 2.25, 2.25], 2: [7.0] * 6}
    monkeypatch.setattr(decompose, "expert_importances", lambda *_: by_layer)
    operations, _ = search(Decompose(alpha=0.5, **how), qwen2_moe())
    expected = {0: (4, 8, 6, 4, 8, 6), 1: (8, 8, 4, 4, 6, 6), 2: (6,) * 6}
    assert {each.layer: dict(each.ranks) for each in operations} == {
        layer: dict.fromkeys(NAMES, ranks) for layer, ranks in expected.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_whitened_factors_lose_less_on_the_calibration_tokens(family: str) -> None:
    errors = {}
    for whitening in (False, True):
        model = FAMILIES[family]()
        tape = recorded(model)
        plan = Plan("tiny", (Factorize(1, dict.fromkeys(NAMES, (6,) * 6), whitening),))
        apply.execute(model, plan, partial(recorded, model))
        block: Any = views.get_block(model, 1)
        outputs = [(block(trace.x_TD[None])[0], trace.output_TD) for trace in tape.trace(model, 1)]
        errors[whitening] = sum(float((found - own).double().square().sum()) for found, own in outputs) ** 0.5
    assert 0 < errors[True] < 0.8 * errors[False]


def test_children_are_drawn_from_both_parents() -> None:
    """Without mutation all sets of the union are born, and nothing else is."""
    children = _children([(0, 1), (2, 3)], 400, 12, 0.0, random.Random(0))
    assert set(children) == set(itertools.combinations(range(4), 2))


@pytest.mark.parametrize(("mutation", "least", "most"), [(0.0, 0, 0), (0.5, 430, 570), (1.0, 1000, 1000)])
def test_children_exchange_one_expert_as_often_as_asked(mutation: float, least: int, most: int) -> None:
    """Of equal parents a child differs in one expert, or in none."""
    children = _children([(0, 1, 2), (0, 1, 2)], 1000, 12, mutation, random.Random(0))
    differing = [len({0, 1, 2} - {*child}) for child in children]
    assert set(differing) <= {0, 1} and least <= sum(differing) <= most
    assert all(len(set(child)) == 3 and set(child) <= set(range(12)) for child in children)


@pytest.mark.parametrize("mutation", [0.0, 1.0])
def test_only_mutation_brings_experts_that_no_parent_drops(mutation: float) -> None:
    looked: list[set[int]] = []

    def errors(dropped_PE: Tensor) -> Tensor:
        looked.append({int(expert) for expert in dropped_PE.any(dim=0).nonzero()})
        return dropped_PE.double() @ torch.arange(1.0, 41.0, dtype=torch.float64)

    best_sets(errors, 40, 2, Genetic(4, 10, 2, mutation, "genetic", memoise=False), 0)
    assert len(looked) == 10
    assert (set.union(*looked[1:]) <= looked[0]) == (mutation == 0.0)


def test_combined_keeps_its_best_round() -> None:
    """The choice around which the last round measures is better than what that round chooses."""
    model = qwen2_moe(2)
    tape = recorded(model)
    operations, record = search(Combined(**COMBINED, rounds=3, budget=Budget(memory_ratio=0.8)), model)
    damages = [each["damage"] for each in record["rounds"]]
    best = min(range(3), key=damages.__getitem__)
    assert damages[0] > damages[best] < damages[-1]
    assert record["chosen"] == record["rounds"][best]["choice"] != record["rounds"][-1]["choice"]
    originals = apply.execute(model, Plan("tiny", tuple(operations)))
    compressed = {layer: views.get_block(model, layer) for layer in originals}
    with views.swap_blocks(model, originals):
        measured = Damage(model, tape).replace(compressed)
    assert measured == pytest.approx(damages[best], rel=1e-4)


def test_combined_gives_what_is_left_to_ranks() -> None:
    """Less is left of the budget than one rank of one expert in each factorized layer."""
    model = qwen2_moe()
    settings = {**COMBINED, "num_experts": (), "kept_ratios": (0.5,), "budget": Budget(memory_ratio=0.85), "rounds": 1}
    operations, _ = search(Combined(**settings), model)
    budget = math.floor(0.85 * sizes(model)["total"])
    apply.execute(model, Plan("tiny", tuple(operations)))
    factorized = sum(isinstance(operation, Factorize) for operation in operations)
    assert factorized and 0 <= budget - sizes(model)["total"] < factorized * RANK_STEP


def refitted(model: Any, operation: Operation, refit: Refit) -> tuple[Any, dict[str, float]]:
    """Layer 1 changed and refitted: its weights before the refit, and what the refit reports."""
    originals = apply.execute(model, Plan("tiny", (operation,)))
    before = bits(views.get_block(model, 1))
    report = apply.refit(model, Plan("tiny", (refit,)), originals, lambda: recorded(model))
    return before, report[1]


@pytest.mark.parametrize(
    ("operation", "what", "solver"),
    [
        (Prune(1, FOUR), "down_proj", "_solve"),
        (Condense(1, (3, 0), (0.4, 0.2), 0.5), "down_proj", "_solve"),
        (Condense(1, (3, 0), (0.4, 0.2), 0.5), "coefficients", "_solve_coefficients"),
    ],
)
def test_a_refit_that_makes_a_layer_worse_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, operation: Operation, what: Any, solver: str
) -> None:
    worse: list[bool] = []

    def ten_times(block: Any, *args: Any) -> None:
        before = bits(block)
        for weight in [unit.weight_Dn for unit in args[0]] if solver == "_solve" else [block.scale]:
            weight *= 10
        worse.append(not same_bits(bits(block), before))

    monkeypatch.setattr(refit_module, solver, ten_times)
    model = qwen2_moe()
    before, report = refitted(model, operation, Refit(1, what, 1e-3))
    assert worse == [True]
    assert same_bits(bits(views.get_block(model, 1)), before)
    assert report["error_after"] == report["error_before"] > 0


def test_parts_that_are_solved_apart_are_solved_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one expert at a time, several sweeps get nearer to the target than one."""
    refit = Refit(1, "down_proj", 1e-3)
    monkeypatch.setattr(refit_module, "most_columns", lambda original: 17)
    _, several = refitted(qwen2_moe(), Prune(1, FOUR), refit)
    monkeypatch.setattr(refit_module, "SWEEPS", 1)
    _, once = refitted(qwen2_moe(), Prune(1, FOUR), refit)
    assert several["error_before"] == once["error_before"]
    assert several["error_after"] < 0.75 * once["error_after"] < once["error_before"]
