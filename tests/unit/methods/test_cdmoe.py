"""CD-MoE's search against a brute-force version of the authors' procedure, and what must not change its result."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import brute_force as bf
from support.agreement import compare
from support.tiny_models import FAMILIES, bits, qwen2_moe, recorded, same_bits, texts, unchanged
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.files import JsonFolder
from recondense.methods.cdmoe import CDMoE
from recondense.methods.step import SearchContext
from recondense.models import families, moe_blocks
from recondense.operations import Condense

HUGE = 1 << 40
CASES = [("qwen2_moe", "mean"), ("qwen2_moe", "token"), ("deepseek_v2", "mean")]
LENGTHS = ((5, 17, 9, 20, 12), (11, 3, 20), (1, 6, 6, 19))


def search(
    step: CDMoE, model: PreTrainedModel, cache: Any = None, scratch: int = HUGE, tape: Callable[[], Tape] | None = None
) -> tuple[list[Condense], dict[str, Any]]:
    recording = tape or (lambda: recorded(model))
    return step.search(SearchContext(model, recording, {} if cache is None else cache, scratch))


def must_not_be_called() -> Tape:
    raise AssertionError("the tape was asked for")


def same_numbers(actual: Sequence[float | None], expected: Sequence[float | None]) -> None:
    assert [value is None for value in actual] == [value is None for value in expected]
    assert [v for v in actual if v is not None] == pytest.approx([v for v in expected if v is not None], rel=5e-6)


def decisions(record: dict[str, Any]) -> dict[str, Any]:
    """The result of a search, without its time and its number of layer runs."""
    layers = {name: value for name, value in record.get("layer_search", {}).items() if name != "layer_runs"}
    return {**{name: record[name] for name in record if name not in ("seconds", "reused")}, "layer_search": layers}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("family", "shared_gate"), CASES)
def test_finds_what_brute_force_finds(family: str, shared_gate: str, seed: int) -> None:
    model, ids = FAMILIES[family](seed), texts(seed, LENGTHS[seed])
    layers = bf.moe_layers(model)
    step = CDMoE(num_experts=3, num_layers=len(layers), shared_gate=shared_gate)
    with unchanged(model):
        operations, record = search(step, model, tape=lambda: recorded(model, ids))
    stats = bf.statistics(model, ids)
    by_layer = {operation.layer: operation for operation in operations}
    for layer in layers:
        entry, layer_stats = record["expert_search"][str(layer)], stats[layer]
        assert entry["selected"] == layer_stats.selected
        same_numbers(entry["coefficients"], layer_stats.coefficients)
        same_numbers([entry["shared_gate_mean"]], [layer_stats.shared_gate_mean])
        expected = bf.expert_search(model, ids, layer, 3, layer_stats, shared_gate=shared_gate, lm_head=False)
        agreement = compare(expected, entry["order"], entry["js"])
        assert agreement.same_plan and agreement.same_order, agreement.problems
        assert entry["js_shared_only"] == pytest.approx(expected.start, rel=1e-4)
        for candidates, scores in zip(entry["candidates"], expected.candidates, strict=True):
            assert [expert for expert, _ in candidates] == list(scores)
            assert [score for _, score in candidates] == pytest.approx(list(scores.values()), rel=1e-4)
        assert by_layer[layer].experts == tuple(expected.order)
        assert by_layer[layer].coefficients == pytest.approx(
            [layer_stats.coefficients[i] for i in expected.order], rel=1e-6
        )
        gate = layer_stats.shared_gate_mean if shared_gate == "mean" else None
        assert by_layer[layer].shared_gate == (None if gate is None else pytest.approx(gate, rel=1e-6))
    experts = {layer: by_layer[layer].experts for layer in layers}
    expected = bf.layer_search(model, ids, len(layers), experts, stats, shared_gate=shared_gate)
    layer_search = record["layer_search"]
    agreement = compare(expected, layer_search["order"], layer_search["js"])
    assert agreement.same_plan and agreement.same_order, agreement.problems
    for candidates, scores in zip(layer_search["candidates"], expected.candidates, strict=True):
        assert dict(map(tuple, candidates)) == pytest.approx(scores, rel=1e-4)
    assert [operation.layer for operation in operations] == expected.order
    assert layer_search["layer_runs"] < expected.count.layer_runs


def to_double(model: PreTrainedModel) -> PreTrainedModel:
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # grouped products have no fp64
    return exact


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_close_to_the_original_keep_their_digits(family: str) -> None:
    """Experts with tiny outputs: JS is near 1e-12, where the definition still works in fp64 but not in fp32."""
    model, ids = FAMILIES[family](), texts()
    with torch.no_grad():
        for block in moe_blocks.sparse_blocks(model).values():
            block.weights.down_EDF.mul_(1e-3)
    step = CDMoE(num_experts=2, num_layers="all", shared_gate="token")
    _, record = search(step, model, tape=lambda: recorded(model, ids))
    stats = bf.statistics(model, ids)
    exact = to_double(model)
    for layer in bf.moe_layers(model):
        entry = record["expert_search"][str(layer)]
        expected = bf.expert_search(exact, ids, layer, 2, stats[layer], shared_gate="token", lm_head=False)
        agreement = compare(expected, entry["order"], entry["js"], tolerance=1e-3)
        assert agreement.same_plan, agreement.problems
        assert entry["js_shared_only"] == pytest.approx(expected.start, rel=1e-3)


def test_scores_far_below_the_first_keep_their_digits() -> None:
    """A router that weighs all experts equally: with the last one, the condensed layer is the original."""
    model, ids = qwen2_moe(num_experts_per_tok=6, num_hidden_layers=1), texts()
    with torch.no_grad():
        block = moe_blocks.sparse_blocks(model)[0]
        block.router.weight.zero_()  # type: ignore[operator]
        block.weights.down_EDF.mul_(torch.logspace(-3, 0, 6)[:, None, None])
    _, record = search(CDMoE(num_experts=6, shared_gate="token"), model, tape=lambda: recorded(model, ids))
    stats = bf.statistics(model, ids)[0]
    expected = bf.expert_search(to_double(model), ids, 0, 6, stats, shared_gate="token", lm_head=False)
    entry = record["expert_search"]["0"]
    assert entry["js"][-1] < 1e-12 < entry["js"][-2] < 1e-8 < 1e-3 < entry["js_shared_only"], entry["js"]
    agreement = compare(expected, entry["order"], entry["js"], tolerance=1e-3)
    assert agreement.same_plan, agreement.problems


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_weight_takes_the_largest_coefficients(family: str) -> None:
    model, ids = FAMILIES[family](), texts()
    step = CDMoE(num_experts=4, num_layers="all", expert_search="routing_weight")
    operations, record = search(step, model)
    stats = bf.statistics(model, ids)
    for operation in operations:
        expected = bf.routing_weight_order(stats[operation.layer], 4)
        assert list(operation.experts) == expected
        entry = record["expert_search"][str(operation.layer)]
        greedy = bf.expert_search(model, ids, operation.layer, 1, stats[operation.layer], lm_head=False)
        assert entry["js"][0] == pytest.approx(greedy.candidates[0][expected[0]], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_frequency_takes_the_experts_that_are_selected_most(family: str) -> None:
    """The lowest index wins a tie; the layers have an order of their own, found by their scores."""
    model, ids = FAMILIES[family](), texts()
    layers = bf.moe_layers(model)
    step = CDMoE(num_experts=3, num_layers=len(layers), expert_search="frequency")
    operations, record = search(step, model)
    stats = bf.statistics(model, ids)
    experts = {}
    for operation in operations:
        selected = stats[operation.layer].selected
        experts[operation.layer] = operation.experts
        assert list(operation.experts) == sorted(range(6), key=lambda expert: (-selected[expert], expert))[:3]
    expected = bf.layer_search(model, ids, len(layers), experts, stats)
    assert record["layer_search"]["order"] == expected.order
    assert step.key() != CDMoE().key() != CDMoE(expert_search="routing_weight").key() != step.key()


@pytest.mark.parametrize(("family", "shared_gate"), CASES)
def test_scratch_does_not_change_a_bit(family: str, shared_gate: str) -> None:
    model = FAMILIES[family]()
    step = CDMoE(num_experts=3, num_layers=2, shared_gate=shared_gate)
    operations, record = search(step, model, scratch=HUGE)
    for scratch in (1, 4 * 6 * 32 * 3, 50_000):
        others, other = search(step, model, scratch=scratch)
        assert others == operations
        assert decisions(other) == decisions(record)


def test_scratch_does_not_change_a_bit_of_a_wider_model() -> None:
    model = qwen2_moe(hidden_size=160, num_experts=24, num_experts_per_tok=8, num_hidden_layers=1)
    step = CDMoE(num_experts=2, num_layers="all")
    with torch.no_grad():
        records = [decisions(search(step, model, scratch=scratch)[1]) for scratch in (HUGE, 1 << 22, 1 << 17, 1)]
    assert all(record == records[0] for record in records[1:])


def test_larger_text_batches_give_the_same_plan() -> None:
    model = qwen2_moe()
    step = CDMoE(num_experts=3, num_layers=3)
    operations, record = search(step, model, tape=lambda: recorded(model, texts_per_block=1))
    others, other = search(step, model, tape=lambda: recorded(model, texts_per_block=5))
    assert [(operation.layer, operation.experts) for operation in operations] == [
        (operation.layer, operation.experts) for operation in others
    ]
    assert record["layer_search"]["js"] == pytest.approx(other["layer_search"]["js"], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_budget_is_a_prefix_and_needs_no_work(family: str, tmp_path: Path) -> None:
    model, cache = FAMILIES[family](), JsonFolder(tmp_path)
    layers = len(bf.moe_layers(model))
    full, record = search(CDMoE(num_experts=3, num_layers=layers), model, cache)
    assert not record["reused"]
    same, again = search(CDMoE(num_experts=3, num_layers=layers), model, cache, tape=must_not_be_called)
    assert same == full and again["reused"] and decisions(again) == decisions(record)
    fewer, again = search(CDMoE(num_experts=3, num_layers=1), model, cache, tape=must_not_be_called)
    assert fewer == full[:1] and again["reused"]
    assert again["layer_search"]["order"] == [full[0].layer]
    assert len(again["layer_search"]["js"]) == len(again["layer_search"]["candidates"]) == 1
    last = bf.moe_layers(model)[-1:]
    listed, again = search(CDMoE(num_experts=2, num_layers=last), model, cache, tape=must_not_be_called)
    assert again["reused"] and [operation.layer for operation in listed] == last
    longest = next(operation for operation in full if operation.layer == last[0])
    assert listed[0].experts == longest.experts[:2] and listed[0].coefficients == longest.coefficients[:2]
    entry = again["expert_search"][str(last[0])]
    assert [len(entry[name]) for name in ("order", "js", "candidates")] == [2, 2, 2]
    none, again = search(CDMoE(num_experts=0, num_layers="all"), model, cache, tape=must_not_be_called)
    assert again["reused"] and all(operation.experts == () for operation in none)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_larger_budget_continues_from_a_smaller_one(family: str, tmp_path: Path) -> None:
    """More experts and more layers extend their orders. Both give what a fresh search gives, bit for bit."""
    model, cache = FAMILIES[family](), JsonFolder(tmp_path)
    layers = len(bf.moe_layers(model))
    search(CDMoE(num_experts=1, num_layers=1), model, cache)
    before = dict(cache)
    for step in (CDMoE(num_experts=1, num_layers=layers), CDMoE(num_experts=4, num_layers=layers)):
        operations, record = search(step, model, cache)
        fresh, expected = search(step, model)
        assert operations == fresh
        assert decisions(record) == decisions(expected)
    for name, entry in before.items():
        assert cache[name]["order"][: len(entry["order"])] == entry["order"]
        assert cache[name]["candidates"][: len(entry["order"])] == entry["candidates"]


class Interrupted(Exception):
    pass


class Breaking(JsonFolder):
    """A cache that takes `writes` entries and is interrupted at the next one."""

    def __init__(self, folder: Path, writes: int) -> None:
        super().__init__(folder)
        self.remaining = writes

    def __setitem__(self, key: str, value: dict[str, Any]) -> None:
        if self.remaining == 0:
            raise Interrupted
        self.remaining -= 1
        super().__setitem__(key, value)


@pytest.mark.parametrize("writes", [0, 1, 3, 4, 5])
def test_an_interrupted_search_resumes(tmp_path: Path, writes: int) -> None:
    """Six writes: the experts of three layers, then three steps of the layer search."""
    model = qwen2_moe()
    step = CDMoE(num_experts=2, num_layers=3)
    with unchanged(model), pytest.raises(Interrupted):
        search(step, model, Breaking(tmp_path, writes))
    assert len(list(tmp_path.iterdir())) == min(writes, 4)
    operations, record = search(step, model, JsonFolder(tmp_path))
    fresh, expected = search(step, model)
    assert operations == fresh and decisions(record) == decisions(expected)
    assert record["layer_search"]["layer_runs"] >= expected["layer_search"]["layer_runs"]


def test_a_search_in_training_mode_and_with_gradients_changes_nothing() -> None:
    model = qwen2_moe().train()
    step = CDMoE(num_experts=2, num_layers=2)
    with unchanged(model), torch.enable_grad():
        operations, _ = search(step, model)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert operations == search(step, model.eval())[0]


def test_experts_that_were_never_selected_are_no_candidates() -> None:
    model = qwen2_moe()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 30  # a dimension that is large and positive for every token
        model.model.layers[1].mlp.gate.weight[:, 0] = torch.tensor([-50.0, 0, 0, 0, -50.0, 0])
    _, record = search(CDMoE(num_experts=4, num_layers=[1]), model)
    entry = record["expert_search"]["1"]
    assert entry["selected"][0] == entry["selected"][4] == 0 < min(entry["selected"][i] for i in (1, 2, 3, 5))
    assert entry["coefficients"][0] is entry["coefficients"][4] is None
    assert entry["mean_routing_weight"][0] == 0
    assert [expert for expert, _ in entry["candidates"][0]] == [1, 2, 3, 5]
    assert sorted(entry["order"]) == [1, 2, 3, 5]
    with pytest.raises(ValueError, match=r"layer 1: .*only 4 of 6 .*method.num_experts=5.*data.calibration"):
        search(CDMoE(num_experts=5, num_layers=[1]), model)


def test_statistics_of_the_routing() -> None:
    model, ids = qwen2_moe(), texts()
    _, record = search(CDMoE(num_experts=0, num_layers=[2]), model)
    assert list(record["expert_search"]) == ["2"] and "layer_search" not in record
    entry = record["expert_search"]["2"]
    tokens = sum(map(len, ids))
    assert sum(entry["selected"]) == 2 * tokens
    for selected, coefficient, mean in zip(
        entry["selected"], entry["coefficients"], entry["mean_routing_weight"], strict=True
    ):
        assert mean == pytest.approx((coefficient or 0.0) * selected / tokens, rel=1e-9)
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_the_first_of_equals_is_taken() -> None:
    """Three experts with the same weights, and a router whose weights are equal in every bit on any machine."""
    model = qwen2_moe(num_experts_per_tok=6, num_hidden_layers=1)
    with torch.no_grad():
        block = moe_blocks.sparse_blocks(model)[0]
        block.router.weight.zero_()  # type: ignore[operator]
        for weight in (block.weights.gate_up_EHD, block.weights.down_EDF):
            weight[5] = weight[1]  # type: ignore[index,operator]
            weight[3] = weight[1]  # type: ignore[index,operator]
    _, record = search(CDMoE(num_experts=6, num_layers="all"), model)
    entry = record["expert_search"]["0"]
    assert entry["coefficients"][1] == entry["coefficients"][3] == entry["coefficients"][5]
    assert [expert for expert in entry["order"] if expert in (1, 3, 5)] == [1, 3, 5]


def test_the_search_works_in_bf16() -> None:
    """The scores of a bf16 model are near those of its fp32 copy, and its weights do not change."""
    model = qwen2_moe().bfloat16()
    before = bits(model)
    operations, record = search(CDMoE(num_experts=2, num_layers=2), model)
    assert same_bits(before, bits(model)) and len(operations) == 2
    exact = copy.deepcopy(model).float()
    _, expected = search(CDMoE(num_experts=2, num_layers=2), exact)
    for layer, entry in record["expert_search"].items():
        assert entry["js_shared_only"] == pytest.approx(expected["expert_search"][layer]["js_shared_only"], rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": -1}, "num_experts=-1"),
        ({"num_experts": True}, "num_experts=True"),
        ({"num_experts": 1.5}, "num_experts=1.5"),
        ({"num_layers": 0}, "method=none"),
        ({"num_layers": "most"}, "num_layers='most'"),
        ({"num_layers": []}, "names no layer"),
        ({"num_layers": [1, 1]}, "twice"),
        ({"num_layers": [1, "2"]}, "list of layers"),
        ({"num_layers": True}, "num_layers=True"),
        ({"shared_gate": "none"}, "mean or token"),
        ({"expert_search": "random"}, "must be one of greedy, frequency, routing_weight"),
    ],
)
def test_settings_that_are_invalid_for_every_model(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CDMoE(**settings)


def test_all_wrong_settings_are_reported_together() -> None:
    with pytest.raises(ValueError) as error:
        CDMoE(num_experts=-1, num_layers=0, shared_gate="x", expert_search="y")
    assert len(str(error.value).splitlines()) == 4


def test_settings_that_do_not_fit_a_model() -> None:
    facts = families.facts(qwen2_moe(num_hidden_layers=4, mlp_only_layers=[0]).config)
    assert CDMoE(num_experts=6, num_layers=3).check(facts) == []
    assert CDMoE(num_experts=2, num_layers=[3, 1]).check(facts) == []
    assert "6 routed experts" in CDMoE(num_experts=7).check(facts)[0]
    assert "3 MoE layers" in CDMoE(num_layers=4).check(facts)[0]
    (problem,) = CDMoE(num_layers=[0, 2]).check(facts)
    assert "layer 0" in problem and "did you mean 1?" in problem
