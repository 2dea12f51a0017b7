"""Dropping against transformers' hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.step_search import search
from support.tiny_models import FAMILIES, recorded, texts
from torch import nn

from recondense.methods.dropping import Dropping
from recondense.methods.search.budget import Budget
from recondense.methods.step import SearchContext
from recondense.models import decoder, moe_blocks


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_similarities_are_cosines_of_hidden_states(family: str) -> None:
    model = FAMILIES[family]()
    layers = list(moe_blocks.sparse_blocks(model))
    before: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    handles = []
    for layer in layers:  # the input of the norm before the block is the residual stream
        norm: Any = decoder.decoder_layers(model)[layer].post_attention_layernorm
        handles.append(norm.register_forward_pre_hook(lambda m, args, layer=layer: before[layer].append(args[0][0])))
    hidden: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(len(decoder.decoder_layers(model)))}
    for layer in hidden:
        decoder_layer = decoder.decoder_layers(model)[layer]
        handles.append(decoder_layer.register_forward_hook(lambda m, a, out, layer=layer: hidden[layer].append(out[0])))
    for text in texts():
        model(input_ids=torch.tensor([text]))
    for handle in handles:
        handle.remove()

    def cosine(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
        return float(nn.functional.cosine_similarity(torch.cat(one), torch.cat(other), dim=1).mean())

    dropped, record = search(Dropping("moe", budget=Budget(removed_expert_ratio=0.5)), model)
    expected = {str(layer): cosine(before[layer], hidden[layer]) for layer in layers}
    assert record["similarity"] == pytest.approx(expected, abs=1e-4)
    assert dropped[0].layer == int(max(expected, key=lambda layer: expected[layer]))
    assert len(dropped) == -(-len(layers) // 2)
    _, record = search(Dropping("layer", budget=Budget(removed_expert_ratio=0.4)), model)
    blocks = {str(layer): cosine(hidden[layer - 1], hidden[layer]) for layer in layers if layer}
    assert record["similarity"] == pytest.approx(blocks, abs=1e-4)
    with pytest.raises(
        ValueError, match=r"dropping layers can save; all .* layers that can be dropped reach memory_ratio="
    ):
        Dropping("layer", budget=Budget(memory_ratio=0.01)).search(
            SearchContext(model, lambda: recorded(model), {}, 1 << 30)
        )
