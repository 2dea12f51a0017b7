"""The search of CD-MoE on every family, against plain torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from support import brute_force as bf
from support.plain_moe import (
    ROUTING,
    PlainMoE,
    Standing,
    block_of,
)
from support.tiny_models import EVERY, recorded, texts
from torch import Tensor

from recondense.methods.cdmoe import CDMoE
from recondense.methods.step import SearchContext
from recondense.models import compressed_classes, moe_blocks


def states_with_block(model: Any, layer: int, ids: list[list[int]], block: Any) -> Any:
    """The residual stream after a layer with another block in it, text by text."""
    with moe_blocks.swap_blocks(model, {layer: block}):
        return bf.states_after(model, [layer], ids, lm_head=False)[layer]


@pytest.mark.parametrize("family", EVERY)
@torch.no_grad()
def test_the_search_of_cdmoe_by_plain_torch(family: str) -> None:
    """Coefficients from the routing of every token, and every candidate's score from a run of the whole model."""
    model, ids = EVERY[family](), texts()
    tape, step = recorded(model, ids), CDMoE(num_experts=2, num_layers="all", shared_gate="token")
    _, record = step.search(SearchContext(model, lambda: tape, {}, 1 << 30))
    for layer in (1, 2):
        block, entry = block_of(model, layer), record["expert_search"][str(layer)]
        plain = PlainMoE(block, ROUTING[family])
        weights_TE = plain.routing_weights(torch.cat([trace.x_TD for trace in tape.trace(model, layer)]).double())
        means = [float(column[column > 0].mean()) if bool(column.any()) else None for column in weights_TE.T]
        assert entry["selected"] == (weights_TE > 0).sum(dim=0).tolist()
        assert entry["coefficients"] == pytest.approx(means, rel=1e-4)

        def condensed(x_TD: Tensor, experts: list[int], plain: Any = plain, means: Any = means) -> Tensor:
            return plain.shared(x_TD) + sum(means[expert] * plain.expert(expert, x_TD) for expert in experts)

        original, pair = states_with_block(model, layer, ids, block), compressed_classes.returns_pair(block)
        assert len(entry["candidates"]) == 2
        for position, candidates in enumerate(entry["candidates"]):
            for expert, score in candidates:
                experts = [*entry["order"][:position], expert]
                stand_in = Standing(partial(condensed, experts=experts), pair)
                assert score == pytest.approx(
                    bf.score(original, states_with_block(model, layer, ids, stand_in)), rel=1e-3
                )
            assert entry["order"][position] == min(candidates, key=lambda candidate: candidate[1])[0]
