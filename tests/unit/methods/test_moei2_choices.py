"""The measurements of MoE-I²'s search decide which experts are dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.brute_force_moei2 import best_of_block, loss_without
from support.step_search import search
from support.tiny_models import qwen2_moe, texts

from recondense.methods import moei2
from recondense.methods.moei2 import InterExpertPruning
from recondense.methods.search.allocation import drop_by_importance
from recondense.models import moe_blocks
from recondense.operations import Prune


def count_dropped(model: Any, operations: list[Prune]) -> dict[int, int]:
    """The number of experts that the operations drop in every sparse layer."""
    retained = {operation.layer: len(operation.retained) for operation in operations}
    blocks = moe_blocks.sparse_blocks(model)
    return {layer: block.num_experts - retained.get(layer, block.num_experts) for layer, block in blocks.items()}


@pytest.mark.parametrize("seed", [1, 2])
def test_moei2_prunes_what_the_reception_field_chose(seed: int) -> None:
    """The plan drops the best of all combinations of candidates, which here are not the best of single layers."""
    model = qwen2_moe(seed, num_hidden_layers=2)
    operations, record = search(InterExpertPruning(prune_ratio=0.5), model)
    candidates = {int(layer): [tuple(experts) for experts, _ in sets] for layer, sets in record["candidates"].items()}
    layers = list(candidates)
    choice = best_of_block(model, [torch.tensor(text) for text in texts()], candidates, layers, {})
    assert any(choice)
    assert operations == [
        Prune.from_dropped(layer, 6, candidates[layer][place]) for layer, place in zip(layers, choice, strict=True)
    ]


def test_moei2_drops_fewer_experts_of_layers_that_matter_more() -> None:
    """The outputs of one layer's experts are twice as large, those of another's half as large."""
    model = qwen2_moe()
    scales = {0: 1.0, 1: 2.0, 2: 0.5}
    for layer, scale in scales.items():
        moe_blocks.sparse_blocks(model)[layer].weights.down_EDF.data *= scale
    operations, record = search(InterExpertPruning(prune_ratio=0.34, normalize=False, num_candidates=1), model)
    importance = {int(layer): value for layer, value in record["layer_importance"].items()}
    order = sorted(importance, key=importance.__getitem__)
    assert order == sorted(scales, key=scales.__getitem__)
    dropped = count_dropped(model, operations)
    assert dropped[order[0]] > dropped[order[1]] > dropped[order[2]] and sum(dropped.values()) == 6


def test_moei2_allocates_by_inverse_importance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importances 2, 1 and 4: shares of 12 by 1/I are 3.43, 6.86 and 1.71."""
    by_layer = {0: 2.0, 1: 1.0, 2: 4.0}
    importances = {layer: [value / 12] * 12 for layer, value in by_layer.items()}
    monkeypatch.setattr(moei2, "expert_importances", lambda *_: importances)
    model = qwen2_moe(num_experts=12)
    operations, _ = search(InterExpertPruning(prune_ratio=12 / 36, num_candidates=1), model)
    assert count_dropped(model, operations) == {0: 3, 1: 7, 2: 2}


def test_moei2_uses_the_importance_of_its_settings() -> None:
    """lm_loss: the increase of transformers' loss without an expert, and the numbers that follow from it."""
    model = qwen2_moe(3, num_hidden_layers=2)
    operations, record = search(InterExpertPruning(prune_ratio=0.34, importance="lm_loss", num_candidates=1), model)
    ids = [torch.tensor(text) for text in texts()]
    original = loss_without(model, ids, {})
    increases = {
        layer: [max(0.0, loss_without(model, ids, {layer: [expert]}) - original) for expert in range(6)]
        for layer in range(2)
    }
    for layer, values in increases.items():
        assert record["expert_importance"][str(layer)] == pytest.approx(values, abs=1e-4)
    expected = drop_by_importance(4, {layer: sum(values) for layer, values in increases.items()}, {0: 6, 1: 6}, 2)
    assert count_dropped(model, operations) == expected == {0: 1, 1: 3}
    by_output, _ = search(InterExpertPruning(prune_ratio=0.34, num_candidates=1), model)
    assert count_dropped(model, by_output) == {0: 2, 1: 2}
