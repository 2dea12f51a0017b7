"""The blocks of every family, before and after operations, against plain torch (tests/support/plain_moe.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.plain_moe import (
    EVEN,
    FOUR,
    LIMIT,
    PAIRS,
    RANKS,
    ROUTING,
    UNEVEN,
    VARIANTS,
    PlainMoE,
    Ranks,
    Standing,
    block_of,
    corrected,
    run,
    tokens,
    variant,
)
from support.tiny_models import EVERY, logits, windows
from torch import Tensor

from recondense.models import decoder, families, moe_blocks, parameters
from recondense.models.routing import Routing
from recondense.operations import Condense, Drop, Factorize, Merge, Narrow, Operation, Prune
from recondense.plan import Plan
from recondense.surgery import execute

IDS = windows(2, 11)
FULL: Ranks = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (16,) * 6)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


# ---------------------------------------------------------------------------------------------- what a family is


def test_every_family_is_tested() -> None:
    """A row without a tiny model or without its routing would pass all other tests."""
    assert set(families.FAMILIES) == set(EVERY) == set(ROUTING)


@pytest.mark.parametrize("family", EVERY)
def test_the_block_adds_its_output_unchanged(family: str) -> None:
    """No norm and no multiplier lies between the MoE block and the residual stream."""
    model = EVERY[family]()
    for layer in families.facts(model.config).moe_layers:
        module = decoder.decoder_layers(model)[layer]
        norm = next(child for name, child in module.named_children() if "post_attention" in name)
        calls: dict[str, Tensor] = {}
        hooks = [
            norm.register_forward_pre_hook(lambda _, inputs, calls=calls: calls.update(residual=inputs[0])),
            moe_blocks.get_block(model, layer).register_forward_hook(partial(_keep_output, calls, "added")),
            module.register_forward_hook(partial(_keep_output, calls, "output")),
        ]
        logits(model, IDS)
        for hook in hooks:
            hook.remove()
        expected = calls["residual"] + calls["added"].view_as(calls["residual"])
        torch.testing.assert_close(calls["output"], expected, rtol=0, atol=1e-6)


def _keep_output(calls: dict[str, Tensor], name: str, module: Any, inputs: Any, output: Any) -> None:
    calls[name] = output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", EVERY)
def test_facts_and_counts(family: str) -> None:
    model = EVERY[family]()
    facts, counts = families.facts(model.config), parameters.parameter_counts(model.config)
    sparse = [layer for layer in range(3) if hasattr(block_of(model, layer), "experts")]
    blocks = [block_of(model, layer) for layer in sparse]
    assert facts.moe_layers == tuple(sparse) == tuple(moe_blocks.sparse_blocks(model)) and len(sparse) >= 2
    assert (facts.num_experts, facts.top_k, facts.hidden_size, facts.num_groups) == (6, 2, 32, 1)
    for block in blocks:
        state = block.state_dict()
        sizes = state["experts.down_proj"].shape
        assert sizes == ((6, 16, 32) if family == "gpt_oss" else (6, 32, 16)) and facts.expert_width == 16
        shared = [value for name, value in state.items() if name.startswith("shared_expert") and "up_proj" in name]
        assert facts.shared_width == sum(len(value) for value in shared)
        assert facts.shared_gate == ("shared_expert_gate.weight" in state)
    weights = dict(model.named_parameters())
    routed = sum(value.numel() for name, value in weights.items() if ".experts." in name)
    router = sum(value.numel() for name, value in weights.items() if ".mlp.gate." in name or ".router." in name)
    assert counts.total == sum(value.numel() for value in weights.values())
    assert (counts.routed_experts, counts.expert) == (routed, routed / 6 / len(sparse))
    assert counts.router_row == router / 6 / len(sparse)
    assert parameters.routed_parameters(model) == routed
    assert all(parameters.expert_size(block) == counts.expert for block in moe_blocks.sparse_blocks(model).values())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_router_agrees_with_routing(name: str) -> None:
    model, routing = variant(name)
    for layer, view in moe_blocks.sparse_blocks(model).items():
        plain, x_TD = PlainMoE(block_of(model, layer), routing), tokens(2.0)
        assert view.routing == routing
        assert view.correction_E is None or torch.equal(view.correction_E.double(), plain.correction_E)
        with torch.no_grad():
            logits_TE, weights_TK, index_TK = view.router(x_TD)
        torch.testing.assert_close(logits_TE.double(), plain.logits(x_TD.double()), **CLOSE)
        dense_TE = torch.zeros(len(x_TD), 6).scatter_(1, index_TK, weights_TK)
        expected_TE = plain.routing_weights(x_TD.double())
        assert torch.equal(dense_TE != 0, expected_TE != 0)
        torch.testing.assert_close(dense_TE.double(), expected_TE, **CLOSE)


def test_large_biases_change_the_selection() -> None:
    for family in ("deepseek_v3", "ernie4_5_moe"):
        view = moe_blocks.sparse_blocks(corrected(family))[2]
        with torch.no_grad():
            logits_TE, _, index_TK = view.router(tokens())
        assert not torch.equal(index_TK.sort().values, logits_TE.topk(2).indices.sort().values)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_a_block_equals_a_loop_over_tokens_and_experts(name: str, experts: str) -> None:
    model, routing = variant(name)
    model.set_experts_implementation(experts)
    for layer in moe_blocks.sparse_blocks(model):
        plain, x_TD = PlainMoE(block_of(model, layer), routing), tokens(3.0)
        torch.testing.assert_close(run(block_of(model, layer), x_TD).double(), plain(x_TD.double()), **CLOSE)
    model.set_experts_implementation("grouped_mm")


def test_the_clamps_of_gpt_oss_are_reached() -> None:
    """The tokens of the test above reach them."""
    plain = PlainMoE(block_of(EVERY["gpt_oss"](), 1), ROUTING["gpt_oss"])
    mixed = tokens(3.0).double() @ plain.state["experts.gate_up_proj"][0] + plain.state["experts.gate_up_proj_bias"][0]
    assert bool((mixed[:, ::2] > LIMIT).any()) and bool((mixed[:, 1::2].abs() > LIMIT).any())


# ---------------------------------------------------------------------------------------------- operations

Expected = Callable[[PlainMoE, Tensor], Tensor]


def combine(plain: PlainMoE, x_TD: Tensor, gate: float | None) -> Tensor:
    """Two experts that every token passes through."""
    return 0.4 * plain.expert(3, x_TD) + 0.2 * plain.expert(0, x_TD) + plain.shared(x_TD, gate)


# By name: the operation on a layer, and what the layer then computes.
CHANGES: dict[str, tuple[Callable[[int], Operation], Expected]] = {
    "prune": (lambda layer: Prune(layer, FOUR), lambda plain, x_TD: plain(x_TD, dropped=(1, 4))),
    "merge": (lambda layer: Merge(layer, *PAIRS), lambda plain, x_TD: plain.merged(*PAIRS)(x_TD)),
    "condense": (lambda layer: Condense(layer, (3, 0), (0.4, 0.2), None), partial(combine, gate=None)),
    "factorize": (lambda layer: Factorize(layer, RANKS), lambda plain, x_TD: plain.truncated(RANKS)(x_TD)),
    "full rank": (lambda layer: Factorize(layer, FULL), lambda plain, x_TD: plain(x_TD)),
    "narrow": (lambda layer: Narrow.from_channels(layer, EVEN), lambda plain, x_TD: plain.narrowed(EVEN)(x_TD)),
    "narrow unlike": (
        lambda layer: Narrow.from_channels(layer, UNEVEN),
        lambda plain, x_TD: plain.narrowed(UNEVEN)(x_TD),
    ),
    "drop": (lambda layer: Drop(layer, "moe"), lambda plain, x_TD: torch.zeros_like(x_TD)),
}


@torch.no_grad()
def check(
    make: Callable[..., Any], routing: Routing, make_operation: Callable[[int], Operation], compute: Expected
) -> None:
    """Change every sparse layer; compare every block, then the logits of the model."""
    student, other = make(), make()
    layers = list(moe_blocks.sparse_blocks(student))
    for layer in layers:
        plain = PlainMoE(block_of(other, layer), routing)
        pair = isinstance(block_of(other, layer)(torch.zeros(1, 1, 32)), tuple)
        other.model.layers[layer].mlp = Standing(partial(compute, plain), pair)
    before = logits(student, IDS)
    execute.execute(student, Plan("tiny", tuple(make_operation(layer) for layer in layers)))
    for layer in layers:
        x_TD = tokens(2.0)
        expected = block_of(other, layer).function(x_TD.double())
        torch.testing.assert_close(run(block_of(student, layer), x_TD).double(), expected, **CLOSE)
    after = logits(student, IDS)
    assert bool(after.isfinite().all()) and not torch.equal(after, before)
    torch.testing.assert_close(after, logits(other, IDS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("name", CHANGES)
def test_operations(name: str, family: str) -> None:
    check(EVERY[family], ROUTING[family], *CHANGES[name])


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in EVERY])
def test_pruning_and_merging_under_other_routers(name: str) -> None:
    for change in ("prune", "merge"):
        check(*VARIANTS[name], *CHANGES[change])


def test_condensing_with_a_constant_in_place_of_the_gate() -> None:
    make_operation = partial(Condense, experts=(3, 0), coefficients=(0.4, 0.2), shared_gate=0.5)
    check(EVERY["qwen2_moe"], ROUTING["qwen2_moe"], make_operation, partial(combine, gate=0.5))


@pytest.mark.parametrize("family", [name for name, make in EVERY.items() if families.facts(make().config).shared_width])
def test_condensing_to_the_shared_experts_alone(family: str) -> None:
    check(EVERY[family], ROUTING[family], lambda layer: Condense(layer, (), ()), lambda plain, x_TD: plain.shared(x_TD))


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
@torch.no_grad()
def test_aligned_means_of_permuted_copies_are_the_expert(family: str) -> None:
    """Experts 1 and 4 become expert 0 with its rows in another order, which merging undoes."""
    model = EVERY[family]()
    experts, generator = block_of(model, 1).experts, torch.Generator().manual_seed(3)
    for other in (1, 4):
        order = torch.randperm(16, generator=generator)
        if family == "gpt_oss":
            mixed = torch.stack((2 * order, 2 * order + 1), dim=1).flatten()
            experts.gate_up_proj[other] = experts.gate_up_proj[0][:, mixed]
            experts.gate_up_proj_bias[other] = experts.gate_up_proj_bias[0][mixed]
            experts.down_proj[other] = experts.down_proj[0][order]
            experts.down_proj_bias[other] = experts.down_proj_bias[0]
        else:
            experts.gate_up_proj[other] = experts.gate_up_proj[0][torch.cat((order, 16 + order))]
            experts.down_proj[other] = experts.down_proj[0][:, order]
    expected, x_TD = run(block_of(model, 1), tokens()), tokens()
    groups, shares = ((0, 1, 4), (2,), (3,), (5,)), ((0.5, 0.2, 0.3), (1.0,), (1.0,), (1.0,))
    plain = copy.deepcopy(model)
    execute.execute(model, Plan("tiny", (Merge(1, groups, shares, align=True),)))
    torch.testing.assert_close(run(block_of(model, 1), x_TD), expected, **CLOSE)
    execute.execute(plain, Plan("tiny", (Merge(1, groups, shares),)))
    assert (run(block_of(plain, 1), x_TD) - expected).abs().max() > 0.1


@pytest.mark.parametrize("family", EVERY)
def test_a_dropped_decoder_layer(family: str) -> None:
    """The model is as if the layer and its entries in the config had never existed."""
    model, other = EVERY[family](), EVERY[family]()
    execute.execute(model, Plan("tiny", (Drop(1, "layer"),)))
    del other.model.layers[1]
    other.config.num_hidden_layers = 2
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(other.config, name, None) is not None:
            setattr(
                other.config, name, [value for layer, value in enumerate(getattr(other.config, name)) if layer != 1]
            )
    torch.testing.assert_close(logits(model, IDS), logits(other, IDS))
