"""Damage against a run of the whole model on every text alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES, recorded, unchanged
from torch import nn

from recondense.methods.search.damage import Damage
from recondense.methods.search.rerun import Change
from recondense.models import decoder, moe_blocks
from recondense.models.removed_blocks import Zeros


def measure_one(damage: Damage, layer: int, block: nn.Module | None) -> float:
    return damage.measure([Change(layer, lambda: block)])[0]


def divergence_of_model(model: Any, tape: Any, blocks: dict[int, nn.Module]) -> float:
    """JS between softmaxes of the final hidden states in fp64, mean over each text, then over texts."""

    def final(ids: torch.Tensor) -> torch.Tensor:
        return decoder.decoder(model)(input_ids=ids[None], use_cache=False).last_hidden_state[0].double()

    means = []
    for batch in tape.texts.local:
        for ids, mask in zip(batch.input_ids_BS, batch.mask_BS, strict=True):
            p = torch.softmax(final(ids[mask]), dim=-1)
            with moe_blocks.swap_blocks(model, blocks):
                q = torch.softmax(final(ids[mask]), dim=-1)
            m = (p + q) / 2
            js = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
            means.append(js.mean())
    return float(torch.stack(means).mean())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_damage_is_the_divergence_of_the_model(family: str) -> None:
    model = FAMILIES[family]()
    tape = recorded(model)
    pruned = {
        layer: moe_blocks.masked_block(block, (0, 2, 5)) for layer, block in moe_blocks.sparse_blocks(model).items()
    }
    with unchanged(model):
        damage = Damage(model, tape)
        assert measure_one(damage, 1, None) == pytest.approx(0.0, abs=1e-9)
        assert measure_one(damage, 1, pruned[1]) == pytest.approx(
            divergence_of_model(model, tape, {1: pruned[1]}), rel=1e-3
        )
        assert measure_one(damage, 2, Zeros()) == pytest.approx(
            divergence_of_model(model, tape, {2: Zeros()}), rel=1e-3
        )
        together = damage.replace(pruned)
        assert together == pytest.approx(divergence_of_model(model, tape, pruned), rel=1e-3)
        assert measure_one(damage, 1, pruned[1]) == pytest.approx(together, rel=1e-6)
        mixed = {**pruned, 1: Zeros()}
        assert measure_one(damage, 1, Zeros()) == pytest.approx(divergence_of_model(model, tape, mixed), rel=1e-3)
        without = {layer: block for layer, block in pruned.items() if layer != 1}
        assert measure_one(damage, 1, None) == pytest.approx(divergence_of_model(model, tape, without), rel=1e-3)
        assert damage.replace({}) == pytest.approx(0.0, abs=1e-9)
