"""Refits against torch's least squares, and what they must not do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES, bits, logits, qwen2_moe, recorded, same_bits, windows
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from recondense.methods.search.damage import Damage
from recondense.models import moe_blocks
from recondense.operations import Condense, Constant, Drop, Factorize, Merge, Operation, Prune, Refit
from recondense.plan import Plan
from recondense.surgery import execute, refit
from recondense.surgery.refit import _inputs_and_targets, units_of

IDS = windows(3, 11)
FOUR = (0, 2, 3, 5)
RANKS = {name: (6, 9, None, 4) for name in ("gate_proj", "up_proj", "down_proj")}
CHANGES: dict[str, tuple[Operation, ...]] = {
    "condense": (Condense(1, (3, 0), (0.4, 0.2), 0.5),),
    "condense, token gate": (Condense(1, (3, 0), (0.4, 0.2), None),),
    "prune": (Prune(1, FOUR),),
    "constant": (Constant(1, FOUR),),
    "merge": (Merge(1, ((0, 1, 2), (3,), (4, 5)), ((0.2, 0.3, 0.5), (1.0,), (0.5, 0.5))),),
    "factorize": (Prune(1, FOUR), Factorize(1, RANKS)),
}


def change(family: str, operations: tuple[Operation, ...]) -> tuple[Any, dict[int, Any]]:
    model = FAMILIES[family]()
    return model, execute.execute(model, Plan("tiny", operations), lambda: recorded(model))


def run(model: Any, originals: dict[int, Any], *refits: Operation) -> dict[int, Any]:
    return execute.refit(model, Plan("tiny", refits), originals, lambda: recorded(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_refit_is_the_ridge_solution(name: str, family: str) -> None:
    """Stacked features and targets, the ridge as further rows, and LAPACK's least squares."""
    model, originals = change(family, CHANGES[name])
    with moe_blocks.swap_blocks(model, originals):
        tape = recorded(model)
    inputs, targets = _inputs_and_targets(model, tape, 1, tape.states[1])
    block: Any = moe_blocks.get_block(model, 1)
    units = units_of(model, 1)
    before = [unit.weight_Dn.clone() for unit in units]
    columns: list[Tensor] = []
    for unit in units:
        rows = []
        for x in inputs:
            padded = torch.zeros(len(x), unit.weight_Dn.shape[1], dtype=torch.float64)
            served, features = unit.features(x)
            padded[served] = features.double()
            rows.append(padded)
        columns.append(torch.cat(rows))
    h = torch.cat(columns, dim=1)
    outputs = torch.cat([block(x[None])[0] for x in inputs]).double()
    weights = torch.cat([weight.double() for weight in before], dim=1)
    rest = outputs - h @ weights.T  # the shared experts, where they are no unit
    ridge = 0.05 * float((h.T @ h).diagonal().mean())
    stacked = torch.cat((h, ridge**0.5 * torch.eye(h.shape[1], dtype=torch.float64)))
    stacked_targets = torch.cat((torch.cat(targets).double() - rest, ridge**0.5 * weights.T))
    expected = torch.linalg.lstsq(stacked, stacked_targets, driver="gelsd").solution.T

    report = run(model, originals, Refit(1, "down_proj", 0.05))[1]
    actual = torch.cat([unit.weight_Dn for unit in units], dim=1).double()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    residual = rest + h @ expected.T - torch.cat(targets)
    assert report["error_after"] == pytest.approx(float(residual.norm() / torch.cat(targets).norm()), rel=1e-3)
    assert report["error_after"] < report["error_before"]


@pytest.mark.parametrize("most", [16, 10])  # of 16 columns per expert
@pytest.mark.parametrize("name", ["condense", "prune", "factorize"])
def test_solving_in_parts_comes_near_to_solving_together(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    together = run(*change("qwen2_moe", CHANGES[name]), Refit(1, "down_proj", 1e-3))[1]
    monkeypatch.setattr(refit, "most_columns", lambda original: most)
    apart = run(*change("qwen2_moe", CHANGES[name]), Refit(1, "down_proj", 1e-3))[1]
    assert apart["error_after"] != together["error_after"]
    assert apart["error_before"] == pytest.approx(together["error_before"])
    gained = together["error_before"] - together["error_after"]
    assert apart["error_before"] - apart["error_after"] > 0.5 * gained


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refit_of_coefficients_only(family: str) -> None:
    model, originals = change(family, (Condense(1, (3, 0), (0.4, 0.2), 0.5 if family == "qwen2_moe" else None),))
    block: Any = moe_blocks.get_block(model, 1)
    before = bits(block)
    report = run(model, originals, Refit(1, "coefficients", 1e-6))[1]
    assert report["error_after"] < report["error_before"]
    after = bits(block)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"scale"}
    assert len(set(block.scale.tolist())) == 3  # the shared part and two experts
    best = report["error_after"]
    with moe_blocks.swap_blocks(model, originals):
        tape = recorded(model)
    inputs, targets = _inputs_and_targets(model, tape, 1, tape.states[1])
    shared = block.shared_width
    with torch.no_grad():
        for part in (slice(0, shared), slice(shared, shared + 16), slice(shared + 16, None)):
            for factor in (0.97, 1.03):
                block.scale[part] *= factor
                error = (torch.cat([block(x[None])[0] for x in inputs]) - torch.cat(targets)).norm()
                assert float(error / torch.cat(targets).norm()) > best
                block.scale[part] /= factor


@pytest.mark.parametrize("family", FAMILIES)
def test_refits_of_several_layers_bring_the_model_nearer_to_the_original(family: str) -> None:
    model = FAMILIES[family]()
    tape = recorded(model)
    layers = list(moe_blocks.sparse_blocks(model))
    before = logits(model, IDS)
    originals = execute.execute(model, Plan("tiny", tuple(Prune(layer, FOUR) for layer in layers)))
    pruned = {layer: moe_blocks.get_block(model, layer) for layer in layers}

    def damage() -> float:
        with moe_blocks.swap_blocks(model, originals):
            measure = Damage(model, tape)
        return measure.replace(pruned)

    worse = damage()
    teacher = {layer: bits(block) for layer, block in originals.items()}
    again = copy.deepcopy(model)
    report = run(model, originals, *(Refit(layer, "down_proj", 1e-2) for layer in layers))
    assert list(report) == layers and damage() < 0.8 * worse
    assert all(same_bits(bits(block), teacher[layer]) for layer, block in originals.items())
    with moe_blocks.swap_blocks(model, originals):
        assert torch.equal(logits(model, IDS), before)
    run(again, originals, *(Refit(layer, "down_proj", 1e-2) for layer in layers))
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_without_anything_to_gain_the_outputs_do_not_change() -> None:
    """With every expert retained, the layer's outputs are the targets already."""
    model, originals = change("qwen2_moe", (Prune(1, (0, 1, 2, 3, 4, 5)),))
    before = logits(model, IDS)
    report = run(model, originals, Refit(1, "down_proj", 1e-2))[1]
    assert report["error_before"] < 1e-5
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-4, atol=1e-4)


def test_half_precision_and_refusals() -> None:
    model = qwen2_moe().bfloat16()
    originals = execute.execute(model, Plan("tiny", (Prune(1, FOUR),)))
    report = run(model, originals, Refit(1, "down_proj", 1e-2))[1]
    assert report["error_after"] < report["error_before"]
    assert moe_blocks.sparse_blocks(model)[1].weights.down_EDF.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="is not condensed, so it has no coefficients"):
        run(model, originals, Refit(1, "coefficients", 1e-2))
    model, originals = change("qwen2_moe", (Drop(1, "moe"),))
    with pytest.raises(ValueError, match="plan removes its block"):
        run(model, originals, Refit(1, "down_proj", 1e-2))


def test_what_is_solved_together_depends_only_on_shapes() -> None:
    """For Qwen1.5-MoE-A2.7B, all 11,264 inner activations of a condensed layer, in 2.5 GB."""
    config = Qwen2MoeConfig(num_hidden_layers=1, num_experts=60, hidden_size=2048, moe_intermediate_size=1408,
                            shared_expert_intermediate_size=5632)  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert 11_264 < refit.most_columns(moe_blocks.get_block(model, 0)) < 16_384
    assert refit.most_columns(moe_blocks.get_block(qwen2_moe(), 0)) == 1024
