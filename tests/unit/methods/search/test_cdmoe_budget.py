"""What remains of CD-MoE's budget goes to the layers where brute force finds the least damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import brute_force as bf
from support.tiny_models import FAMILIES, logits, qwen2_moe, recorded, texts, unchanged, windows
from transformers import AutoModelForCausalLM

from recondense.calibration.tape import Tape
from recondense.export.write_folder import write_folder
from recondense.files import JsonFolder
from recondense.methods.cdmoe import CDMoE
from recondense.methods.search import cdmoe_budget
from recondense.methods.search.budget import Budget
from recondense.methods.search.cdmoe_budget import fewest, spread_evenly
from recondense.methods.step import SearchContext
from recondense.models import model_classes, moe_blocks
from recondense.models.parameters import count_parameters
from recondense.operations import Condense, Prune
from recondense.plan import Plan
from recondense.surgery import execute


def search(step: CDMoE, model: Any, cache: Any = None, tape: Any = None) -> tuple[list[Condense], dict[str, Any]]:
    recording = tape or (lambda: recorded(model))
    return step.search(SearchContext(model, recording, {} if cache is None else cache, 1 << 30))


def numbers_of(operations: list[Condense]) -> dict[int, int]:
    return {operation.layer: len(operation.experts) for operation in operations}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("most_rounds", "rounds"), [(16, [1, 1, 1, 1]), (3, [2, 2])])
def test_gives_what_brute_force_gives(
    family: str, most_rounds: int, rounds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers of one expert each save ten; the budget asks for six, so that four go back, one or two at a time."""
    monkeypatch.setattr(cdmoe_budget, "ROUNDS", most_rounds)
    model, ids = FAMILIES[family](), texts()
    experts = 6 * len(bf.moe_layers(model))
    with unchanged(model):
        operations, record = search(CDMoE(num_experts=1, budget=Budget(removed_expert_ratio=6 / experts)), model)
    stats = bf.statistics(model, ids)
    orders = {
        operation.layer: bf.expert_search(model, ids, operation.layer, 6, stats[operation.layer], lm_head=False).order
        for operation in operations
    }
    assert len(orders) == 2
    numbers, scores = bf.give_back(model, ids, rounds, 1, orders, stats)
    assert numbers_of(operations) == numbers and sum(numbers.values()) == 6
    assert record["remainder"]["experts"] == rounds and record["remainder"]["not_given"] == 0
    measured = [dict(map(tuple, candidates)) for candidates in record["remainder"]["candidates"]]
    assert measured == [pytest.approx(expected, rel=1e-4) for expected in scores]
    for operation in operations:
        assert list(operation.experts) == orders[operation.layer][: numbers[operation.layer]]
        assert len(record["expert_search"][str(operation.layer)]["order"]) == numbers[operation.layer]


def must_not_be_called() -> Tape:
    raise AssertionError("the tape was asked for")


def test_a_sweep_over_budgets_searches_once(tmp_path: Path) -> None:
    """A mild budget gives back the experts that a stricter one gives back, and more. Both give what fresh ones give."""
    model, cache = qwen2_moe(), JsonFolder(tmp_path)
    mild, strict, fresh = (
        search(CDMoE(num_experts=1, budget=Budget(removed_expert_ratio=number / 18)), model, known)
        for number, known in ((6, cache), (8, None), (6, None))
    )
    assert mild[0] == fresh[0] and mild[1]["remainder"] == fresh[1]["remainder"]
    step = CDMoE(num_experts=1, budget=Budget(removed_expert_ratio=8 / 18))
    again = search(step, model, cache, must_not_be_called)
    assert again[0] == strict[0] and again[1]["remainder"] == strict[1]["remainder"]
    assert strict[1]["remainder"]["order"] == mild[1]["remainder"]["order"][:2]


class Interrupted(Exception):
    pass


def test_an_interrupted_search_resumes(tmp_path: Path) -> None:
    model = qwen2_moe()
    step = CDMoE(num_experts=1, budget=Budget(removed_expert_ratio=6 / 18))

    class Breaking(JsonFolder):
        def __setitem__(self, key: str, value: dict[str, Any]) -> None:
            if len(list(tmp_path.glob("more-*"))) == 2:
                raise Interrupted
            super().__setitem__(key, value)

    with unchanged(model), pytest.raises(Interrupted):
        search(step, model, Breaking(tmp_path))
    operations, record = search(step, model, JsonFolder(tmp_path))
    fresh, expected = search(step, model)
    assert operations == fresh and record["remainder"] == expected["remainder"]


def test_experts_that_no_token_selects_are_not_given_back() -> None:
    """The routers select only two experts, so that a layer can take none beside them."""
    model = qwen2_moe()
    for block in moe_blocks.sparse_blocks(model).values():
        model.model.embed_tokens.weight.data[:, 0] = 30
        block.router.weight.data[:, 0] = 0  # type: ignore[operator, index]
        block.router.weight.data[2:, 0] = -50  # type: ignore[operator, index]
    operations, record = search(CDMoE(num_experts=1, budget=Budget(removed_expert_ratio=6 / 18)), model)
    assert all(number <= 2 for number in numbers_of(operations).values())
    assert record["remainder"]["not_given"] > 0


@pytest.mark.parametrize("ratio", [0.8, 0.7])
def test_after_pruning_layers_of_different_sizes_meet_the_budget(ratio: float) -> None:
    """How much a layer saves then depends on the layer that the search chooses."""
    model = qwen2_moe()
    total = count_parameters(model)
    execute.execute(model, Plan("tiny", (Prune(0, (0, 3)), Prune(2, (1, 2, 3, 4, 5)))))
    operations, _ = search(CDMoE(num_experts=1, budget=Budget(memory_ratio=ratio)), model)
    execute.execute(model, Plan("tiny", tuple(operations)))
    assert ratio * total - 3 * 32 * 16 < count_parameters(model) <= ratio * total


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_different_widths_are_exported(family: str, tmp_path: Path) -> None:
    """Five experts in two layers cannot be equally many. Narrower layers are padded, or the folder is a bundle."""
    model = FAMILIES[family]()
    experts = 6 * len(bf.moe_layers(model))
    operations, _ = search(CDMoE(num_experts=1, budget=Budget(removed_expert_ratio=7 / experts)), model)
    numbers = list(numbers_of(operations).values())
    assert sum(numbers) == 5 and len(set(numbers)) == 2
    plan = Plan("tiny", tuple(operations))
    execute.execute(model, plan)
    kind = write_folder(model, None, plan, tmp_path / "out", "")
    model_classes.register_model_type(family if kind == "stock" else f"recondense_{family}")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = windows(3, 11)
    torch.testing.assert_close(logits(loaded.eval(), ids), logits(model, ids), rtol=0, atol=1e-4)


def test_fewest_layers() -> None:
    assert [fewest([5, 5, 5], need) for need in (0, 1, 5, 6, 15, 16)] == [0, 1, 1, 2, 3, 4]
    assert fewest([2, 9], 3) == 2 and fewest([9, 2], 3) == 1


def test_experts_are_spread_evenly() -> None:
    assert spread_evenly({4: 3, 5: 3}, 3) == {4: 2, 5: 1}
    assert spread_evenly({4: 1, 5: 3}, 4) == {4: 1, 5: 3}
    assert spread_evenly({4: 1, 5: 0}, 4) == {4: 1, 5: 0}
    assert spread_evenly({}, 4) == {}


def test_an_outline_that_gives_experts_back_is_uneven() -> None:
    """Four experts go back to two layers. Equal numbers would pass for a row of the paper, which has no budget."""
    outline = CDMoE(num_experts=1, budget=Budget(removed_expert_ratio=6 / 18)).outline(qwen2_moe())
    assert numbers_of(outline) == {0: 4, 1: 2}
    exact = CDMoE(num_experts=1, budget=Budget(removed_expert_ratio=10 / 18)).outline(qwen2_moe())
    assert numbers_of(exact) == {0: 1, 1: 1}


def test_layers_that_would_lose_super_experts_are_condensed_last() -> None:
    """With a budget as with a number of layers; a search without protection has its own layer order in the cache."""
    model, cache, tape = qwen2_moe(), {}, recorded(qwen2_moe())
    plain, _ = search(CDMoE(1, num_layers=2), model, cache, lambda: tape)
    first, second = (operation.layer for operation in plain)
    old = dict(cache)
    for too_many, layers in (([first], {0, 1, 2} - {first}), ([0, 1, 2], {first, second})):
        protected = dict.fromkeys(too_many, frozenset({0, 3}))
        for step in (CDMoE(1, num_layers=2), CDMoE(1, budget=Budget(removed_expert_ratio=0.5))):
            context = SearchContext(model, lambda: tape, cache, 1 << 30, protected=protected)
            operations, _ = step.search(context)
            assert {operation.layer for operation in operations} == layers, (too_many, step)
    assert {name: cache[name] for name in old} == old
    context = SearchContext(
        model, lambda: tape, {}, 1 << 30, protected=dict.fromkeys((first, second), frozenset({0, 3}))
    )
    operations, _ = CDMoE(1, num_layers=2).search(context)
    assert [operation.layer for operation in operations] == [*{0, 1, 2} - {first, second}, first]  # as few as possible
