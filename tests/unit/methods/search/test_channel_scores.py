"""Scores of channels, against autograd on the whole model, leave-one-out errors and the enumeration of all subsets."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from support.plain_moe import PlainMoE, block_of
from support.tiny_models import EVERY, logits, qwen2_moe, recorded, texts, unchanged
from torch import Tensor, nn

from recondense.methods.search.channel_scores import channel_scores
from recondense.methods.search.gradients import gradients_below, loss_gradients
from recondense.methods.search.widths import retained_channels
from recondense.methods.step import SearchContext
from recondense.models import families, moe_blocks
from recondense.operations import Narrow
from recondense.plan import Plan
from recondense.surgery import execute


def scores_of(model: Any, score: str, cache: dict[str, Any] | None = None) -> dict[int, Tensor]:
    context = SearchContext(model, lambda: recorded(model), {} if cache is None else cache, 1 << 30)
    return channel_scores(context, moe_blocks.sparse_blocks(model), score)


def whole_backward(model: Any) -> dict[int, list[dict[str, Tensor]]]:
    """For each layer and text: the block's input, its output's gradient, the selected experts and their weights.

    The whole model in one backward pass, of the sum of the losses of all predicted tokens.
    """
    layers = families.facts(model.config).moe_layers
    calls: dict[int, list[dict[str, Tensor]]] = {layer: [] for layer in layers}
    for ids in texts():
        last: dict[int, dict[str, Any]] = {layer: {} for layer in layers}
        handles = []
        for layer, call in last.items():
            block = moe_blocks.sparse_blocks(model)[layer]

            def keep(module: nn.Module, args: Any, output: Any, call: dict[str, Any] = call) -> None:
                output = output[0] if isinstance(output, tuple) else output
                output.retain_grad()
                call.update(x=args[0], output=output)

            def keep_router(module: nn.Module, args: Any, output: Any, call: dict[str, Any] = call) -> None:
                call.update(weights=output[1], index=output[2])

            handles += [block.module.register_forward_hook(keep), block.router.register_forward_hook(keep_router)]
        model.model.embed_tokens.weight.requires_grad_(True)
        ids_1S = torch.tensor([ids])
        logits_SV = model(input_ids=ids_1S, use_cache=False).logits[0]
        nn.functional.cross_entropy(logits_SV[:-1], ids_1S[0, 1:], reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for layer, call in last.items():
            rows = {name: call[name].detach().reshape(len(ids), -1) for name in ("x", "weights", "index")}
            calls[layer].append({**rows, "gradient": call["output"].grad.reshape(len(ids), -1)})
    model.zero_grad()
    return calls


@pytest.mark.parametrize("family", EVERY)
def test_gradients_of_single_layers_are_those_of_the_whole_model(family: str) -> None:
    """Also with a logit at a time, and without changing the model."""
    model = EVERY[family]()
    expected = whole_backward(EVERY[family]())
    model.requires_grad_(False)
    with unchanged(model):
        tape = recorded(model)
        gradients = loss_gradients(model, tape, 1)
        for layer in reversed(range(tape.num_layers)):
            if layer in expected:
                actual = torch.cat([tape.real_tokens(index, one) for index, one in enumerate(gradients)])
                whole = torch.cat([call["gradient"] for call in expected[layer]])
                torch.testing.assert_close(actual, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
            gradients = gradients_below(model, tape, layer, gradients)


def tokens_of(calls: list[dict[str, Tensor]], expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, routing weights and gradients of the expert's tokens, in fp64."""
    parts = []
    for call in calls:
        selected = call["index"] == expert
        rows = selected.any(dim=1)
        parts.append((call["x"][rows], (call["weights"] * selected).sum(dim=1)[rows], call["gradient"][rows]))
    x, weights, gradients = (torch.cat(tensors).double() for tensors in zip(*parts, strict=True))
    return x, weights, gradients


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_second_order_scores_are_leave_one_out_errors(family: str) -> None:
    """½ mean δᵀGδ, with δ the change of the expert's output without one channel, and G from the whole model's autograd.

    Summed over the expert's tokens and divided by all tokens, as the docstring says.
    """
    model = EVERY[family]()
    actual, calls = scores_of(model, "heapr"), whole_backward(EVERY[family]())
    num_tokens = sum(map(len, texts()))
    for layer, scores_EF in actual.items():
        plain = PlainMoE(block_of(EVERY[family](), layer), None)  # type: ignore[arg-type]
        for expert in (0, 4):
            x_tD, weight_t, gradient_tD = tokens_of(calls[layer], expert)
            weighted_tD = weight_t[:, None] * gradient_tD
            hessian_DD = weighted_tD.T @ weighted_tD / max(1, len(x_tD))
            full_tD = plain.expert(expert, x_tD)
            for channel in (0, 7, 15):
                others = [range(16)] * expert + [[c for c in range(16) if c != channel]] + [range(16)] * (5 - expert)
                delta_tD = full_tD - plain.narrowed(others).expert(expert, x_tD)
                error = 0.5 * float(((delta_tD @ hessian_DD) * delta_tD).sum()) / num_tokens
                assert float(scores_EF[expert, channel]) == pytest.approx(error, rel=2e-3), (layer, expert, channel)


@torch.no_grad()
def test_the_channels_by_norms_are_the_best_of_all_subsets() -> None:
    """If the columns of down_proj are orthogonal, no other set of channels changes the layer's output less."""
    model = qwen2_moe(moe_intermediate_size=8, norm_topk_prob=False)
    for layer, block in moe_blocks.sparse_blocks(model).items():
        down_EDF = block.weights.down_EDF
        for expert in range(6):
            basis_DF, _ = torch.linalg.qr(down_EDF[expert])
            down_EDF[expert] = basis_DF * torch.linspace(0.2, 2.0, 8)[torch.randperm(8)]
        tape = recorded(model)
        scores_EF = scores_of(model, "norms")[layer]
        channels = retained_channels(scores_EF, [4] * 6)
        whole = PlainMoE(block_of(model, layer), None)  # type: ignore[arg-type]
        calls = [
            {"x": trace.x_TD, "index": trace.top_k_index_TK, "weights": trace.top_k_weights_TK, "gradient": trace.x_TD}
            for trace in tape.trace(model, layer)
        ]
        for expert in (1, 5):  # an expert's part of the error depends only on its own channels
            x_tD, weight_t, _ = tokens_of(calls, expert)
            errors = {}
            for retained in combinations(range(8), 4):
                trial = [range(8)] * expert + [retained] + [range(8)] * (5 - expert)
                change_tD = whole.expert(expert, x_tD) - whole.narrowed(trial).expert(expert, x_tD)
                errors[retained] = float((weight_t[:, None] * change_tD).square().sum())
            assert min(errors, key=lambda retained: errors[retained]) == tuple(channels[expert])


@torch.no_grad()
def test_the_channels_by_the_second_order_are_the_best_of_all_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all sets of four channels, removed together, with the quadratic loss ½ Σ δᵀGδ.

    The gradients are given, and the columns of down_proj are eigenvectors of G. So the channels do not interact in the
    loss, and the set with the least sum of scores must be the best one.
    """
    model = qwen2_moe(moe_intermediate_size=8)
    layer, expert, generator = 2, 3, torch.Generator().manual_seed(0)
    tape = recorded(model)
    gradients = [torch.randn(state.shape, generator=generator) for state in tape.states[-1]]
    monkeypatch.setattr("recondense.methods.search.channel_scores.loss_gradients", lambda *_: gradients)
    calls = [
        {"x": trace.x_TD, "index": trace.top_k_index_TK, "weights": trace.top_k_weights_TK,
         "gradient": tape.real_tokens(index, gradients[index])}
        for index, trace in enumerate(tape.trace(model, layer))
    ]  # fmt: skip
    x_tD, weight_t, gradient_tD = tokens_of(calls, expert)
    weighted_tD = weight_t[:, None] * gradient_tD
    hessian_DD = weighted_tD.T @ weighted_tD / len(x_tD)
    block = moe_blocks.sparse_blocks(model)[layer]
    values, vectors = torch.linalg.eigh(hessian_DD)
    scale = torch.rand(8, generator=generator, dtype=torch.float64) / values[-8:].sqrt()
    block.weights.down_EDF[expert].copy_(vectors[:, -8:] * scale)
    context = SearchContext(model, lambda: recorded(model), {}, 1 << 30)
    [scores_EF] = channel_scores(context, {layer: block}, "heapr").values()
    kept = retained_channels(scores_EF, [4] * 6)[expert]
    plain, losses = PlainMoE(block_of(model, layer), None), {}  # type: ignore[arg-type]
    for retained in combinations(range(8), 4):
        trial = [range(8)] * expert + [retained] + [range(8)] * (5 - expert)
        delta_tD = plain.expert(expert, x_tD) - plain.narrowed(trial).expert(expert, x_tD)
        losses[retained] = 0.5 * float(((delta_tD @ hessian_DD) * delta_tD).sum())
    assert min(losses, key=lambda retained: losses[retained]) == tuple(kept)
    expected = float(scores_EF[expert].sum() - scores_EF[expert, kept].sum()) * tape.num_tokens
    assert losses[tuple(kept)] == pytest.approx(expected, rel=1e-3)


def test_scores_come_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that was killed below a layer does not score this layer again, and gets the same scores."""
    model = qwen2_moe()
    cache: dict[str, Any] = {}
    expected = scores_of(model, "heapr", cache)
    assert sorted(cache) == [f"channels-heapr-{layer:03d}" for layer in range(3)]
    del cache["channels-heapr-001"]
    kept = dict(cache)
    again = scores_of(model, "heapr", cache)
    assert all(torch.equal(again[layer], expected[layer]) for layer in expected)
    assert all(cache[name] is record for name, record in kept.items())
    monkeypatch.setattr("recondense.methods.search.channel_scores.loss_gradients", lambda *_: pytest.fail("computed"))
    assert list(scores_of(model, "heapr", cache)) == [0, 1, 2]


def test_the_channels_with_the_least_scores_do_less_damage_than_the_others() -> None:
    """To the model's logits, for both scores."""
    ids = torch.tensor(texts(0, [12] * 6))
    damage = {}
    for score in ("heapr", "norms"):
        for sign in (1, -1):
            model = qwen2_moe()
            before = logits(model, ids)
            channels = {layer: retained_channels(sign * one, [8] * 6) for layer, one in scores_of(model, score).items()}
            operations = (Narrow.from_channels(layer, retained) for layer, retained in channels.items())
            execute.execute(model, Plan("tiny", tuple(operations)))
            damage[score, sign] = float((logits(model, ids) - before).norm())
    assert damage["heapr", 1] < damage["heapr", -1] and damage["norms", 1] < damage["norms", -1]
