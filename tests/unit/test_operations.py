"""Prune, merge and drop against transformers' modules; the shapes of every operation, alone and after another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.brute_force_moei2 import without_experts
from support.tiny_models import FAMILIES, bits, deepseek_v2, logits, qwen2_moe, recorded, same_bits, windows

from recondense.models import decoder, families, moe_blocks, parameters
from recondense.models.removed_blocks import SkippedLayer, Zeros
from recondense.operations import Condense, Constant, Drop, Factorize, Merge, Narrow, Operation, Prune
from recondense.plan import Plan
from recondense.surgery import execute

IDS = windows(3, 11)
RANKS = {"gate_proj": (3, 5, None, 2), "up_proj": (3, 5, None, 2), "down_proj": (3, 5, None, 2)}


def hidden(model: Any) -> torch.Tensor:
    return torch.randn(2, 7, model.config.hidden_size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "make",
    [*FAMILIES.values(), lambda: qwen2_moe(norm_topk_prob=True), lambda: deepseek_v2(n_group=2, num_experts_per_tok=2)],
)
@pytest.mark.parametrize("retained", [(0, 2, 3, 5), (1, 4)])
@torch.no_grad()
def test_pruning_gives_the_block_without_those_experts(make: Any, retained: tuple[int, ...]) -> None:
    model = make()
    block = moe_blocks.get_block(model, 2)
    expected = without_experts(block, [expert for expert in range(6) if expert not in retained])(hidden(model))
    tried = moe_blocks.masked_block(moe_blocks.sparse_blocks(model)[2], retained)(hidden(model))
    torch.testing.assert_close(tried, expected, rtol=1e-5, atol=1e-5)
    execute.execute(model, Plan("tiny", (Prune(2, retained),)))
    pruned = moe_blocks.get_block(model, 2)
    torch.testing.assert_close(pruned(hidden(model)), expected, rtol=1e-5, atol=1e-5)
    assert moe_blocks.sparse_blocks(model)[2].weights.down_EDF.shape[0] == len(retained)
    assert not torch.equal(expected, block(hidden(model)))


@torch.no_grad()
def test_groups_stay_equal() -> None:
    model = deepseek_v2(n_group=2, topk_group=1, topk_method="group_limited_greedy")
    block = moe_blocks.get_block(model, 2)
    view = moe_blocks.sparse_blocks(model)[2]
    assert view.routing.num_groups == 2 and families.facts(model.config).num_groups == 2
    # transformers gives groups a score of 0 where it masks, so the reference is its router of four experts.
    small = deepseek_v2(n_group=2, topk_group=1, topk_method="group_limited_greedy", n_routed_experts=4)
    reference: Any = moe_blocks.get_block(small, 2)
    retained = [0, 2, 4, 5]
    original: Any = block
    reference.gate.weight.copy_(original.gate.weight[retained])
    _, weights, index = reference.gate(hidden(model))
    _, pruned_weights, table = moe_blocks.pruned_router(view, retained)(hidden(model))
    assert torch.equal(pruned_weights, weights) and torch.equal(table, index)
    for wrong in ([0, 1, 2, 3], [0, 3]):
        with pytest.raises(ValueError, match="the same number, at least 2"):
            moe_blocks.pruned_router(view, wrong)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merging_replaces_every_expert_by_the_mean_of_its_group(family: str) -> None:
    model = FAMILIES[family]()
    groups, weights = ((3, 0), (1,), (5, 2, 4)), ((0.75, 0.25), (1.0,), (0.5, 0.5, 0.0))
    reference: Any = copy.deepcopy(moe_blocks.get_block(model, 1))
    for name in ("gate_up_proj", "down_proj"):
        projection = getattr(moe_blocks.get_block(model, 1).experts, name)
        for group, shares in zip(groups, weights, strict=True):
            mean = sum(share * projection[expert] for expert, share in zip(group, shares, strict=True))
            for expert in group:
                getattr(reference.experts, name)[expert] = mean
    execute.execute(model, Plan("tiny", (Merge(1, groups, weights),)))
    merged: Any = moe_blocks.get_block(model, 1)
    torch.testing.assert_close(merged(hidden(model)), reference(hidden(model)), rtol=1e-5, atol=1e-5)
    assert merged.experts.down_proj.shape[0] == 3
    with pytest.raises(ValueError, match="merged"):
        execute.execute(model, Plan("tiny", (Prune(1, (0, 1)),)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["moe", "layer"])
@torch.no_grad()
def test_a_dropped_block_or_layer_adds_nothing(family: str, part: Any) -> None:
    model, reference = FAMILIES[family](), FAMILIES[family]()
    layer: Any = decoder.decoder_layers(reference)[1]
    for name, parameter in layer.named_parameters():
        if (name.endswith("o_proj.weight") and part == "layer") or "down_proj" in name:
            parameter.zero_()
    originals = execute.execute(model, Plan("tiny", (Drop(1, part),)))
    assert isinstance(moe_blocks.get_block(model, 1), Zeros if part == "moe" else SkippedLayer)
    torch.testing.assert_close(logits(model, IDS), logits(reference, IDS), rtol=1e-5, atol=1e-5)
    before = logits(FAMILIES[family](), IDS)
    with moe_blocks.swap_blocks(model, originals):
        assert torch.equal(logits(model, IDS), before)
    torch.testing.assert_close(logits(model, IDS), logits(reference, IDS), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_first_layer_of_an_attention_type_cannot_be_dropped() -> None:
    """Its cache gives the masks of that type their size: without it, padded prompts would be read wrongly."""
    model = qwen2_moe(num_hidden_layers=4, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    types = model.config.layer_types
    assert decoder.cache_layers(model.config) == {0, 1} == {types.index(kind) for kind in set(types)}
    with pytest.raises(ValueError, match="layer 1: the key-value cache"):
        execute.execute(model, Plan("tiny", (Drop(1, "layer"),)))


@torch.no_grad()
def test_generation_without_a_layer_uses_the_cache_correctly() -> None:
    model = qwen2_moe()
    execute.execute(model, Plan("tiny", (Drop(1, "layer"),)))
    with_cache = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
    without = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(with_cache, without)
    with pytest.raises(ValueError, match="cache counts tokens"):
        execute.execute(model, Plan("tiny", (Drop(0, "layer"),)))


PLANS: dict[str, tuple[Operation, ...]] = {
    "condense": (Condense(1, (3, 0), (0.4, 0.2), 0.5),),
    "prune": (Prune(1, (0, 2, 5)),),
    "merge": (Merge(1, ((0, 1, 2), (3,), (4, 5)), ((0.2, 0.3, 0.5), (1.0,), (0.5, 0.5))),),
    "constant": (Constant(1, (0, 2, 5)), Prune(2, (0, 1, 4))),
    "drop": (Drop(1, "moe"), Drop(2, "layer")),
    "prune, factorize": (Prune(1, (0, 2, 3, 5)), Factorize(1, RANKS)),
    "prune, factorize with whitening": (Prune(1, (0, 2, 3, 5)), Prune(2, (1, 2)), Factorize(1, RANKS, whitening=True)),
    "prune, narrow": (Prune(1, (0, 2, 3, 5)), Narrow.from_channels(1, ((0, 3, 5, 7),) * 4)),
    "narrow, factorize": (
        *(Narrow.from_channels(layer, ((0, 3, 5, 7),) * 6, True) for layer in (1, 2)),
        *(Factorize(1, {name: (2,) * 6 for name in RANKS}, whitening=True), Prune(2, (0, 4))),
    ),
    "merge, narrow unlike": (
        Merge(1, ((0, 1, 2), (3,), (4, 5)), ((0.2, 0.3, 0.5), (1.0,), (0.5, 0.5))),
        Narrow.from_channels(1, ((0, 3, 5, 7), (2,), range(9)), True),
    ),
    "narrow, condense": (Narrow.from_channels(1, ((0, 3, 5, 7),) * 6), Condense(1, (2,), (0.4,), 0.5)),
    "prune twice": (Prune(1, (0, 2, 3, 5)), Prune(1, (0, 3))),
    "prune, condense": (Prune(1, (0, 2, 3, 5)), Condense(1, (2,), (0.4,), 0.5)),
    "prune, drop": (Prune(1, (0, 2, 3, 5)), Drop(1, "layer")),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PLANS)
def test_restructured_models_take_the_weights_of_the_operation(family: str, name: str) -> None:
    plan = Plan("tiny", PLANS[name])
    model = FAMILIES[family]()
    before, untouched = bits(model), logits(model, IDS)
    originals = execute.execute(model, plan, lambda: recorded(model))
    applied = logits(model, IDS)
    with moe_blocks.swap_blocks(model, originals):
        assert torch.equal(logits(model, IDS), untouched)

    shaped = FAMILIES[family]()
    replaced = execute.restructure(shaped, plan)
    shaped.load_state_dict(model.state_dict())
    assert torch.equal(logits(shaped, IDS), applied)
    for layer, block in replaced.items():
        moe_blocks.set_block(shaped, layer, block)
    assert same_bits(bits(shaped), before)

    with torch.device("meta"):
        empty: Any = type(shaped)(shaped.config)
    execute.restructure(empty, plan)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_a_plan_that_fails_half_way_leaves_the_model_unchanged() -> None:
    model = qwen2_moe()
    before = bits(model)
    for wrong in (Prune(1, (0,)), Prune(1, (0, 1, 9)), Factorize(1, RANKS)):
        with pytest.raises(ValueError, match="layer 1"):
            execute.execute(model, Plan("tiny", (Drop(2, "layer"), Drop(0, "moe"), wrong)))
        assert same_bits(bits(model), before) and not any(
            isinstance(module, Zeros | SkippedLayer) for module in model.modules()
        )
    with pytest.raises(ValueError, match="narrow with compensate needs the calibration set"):
        execute.execute(model, Plan("tiny", (Narrow.from_channels(1, ((0, 3, 5, 7),) * 6, True),)))
    with pytest.raises(ValueError, match="needs the calibration set"):
        execute.execute(model, Plan("tiny", (Factorize(1, RANKS, whitening=True),)))


def test_counts_of_the_original_model_from_its_config() -> None:
    for make in FAMILIES.values():
        model = make()
        counts = parameters.parameter_counts(model.config)
        assert counts.total == sum(parameter.numel() for parameter in model.parameters())
        blocks = moe_blocks.sparse_blocks(model)
        routed = sum(p.numel() for block in blocks.values() for p in block.experts.parameters())
        assert counts.routed_experts == routed
        assert counts.expert == routed // (6 * len(blocks)) and counts.router_row == 32
