"""Partial preservation against its description, by plain loops over tokens and experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.plain_moe import ROUTING, PlainMoE, block_of, run, tokens
from support.step_search import search
from support.tiny_models import EVERY, recorded, texts

from recondense.methods.half_merging import HalfMerging
from recondense.methods.search.budget import Budget
from recondense.methods.step import SearchContext
from recondense.models import moe_blocks
from recondense.plan import Plan
from recondense.surgery import execute


@torch.no_grad()
def scores_by_hand(model: Any, layer: int, plain: PlainMoE) -> tuple[list[float], list[int], Any, Any]:
    """REAP's saliency, tokens per expert, and the cosine similarities of router logits and of mean outputs."""
    inputs: list[torch.Tensor] = []
    block = block_of(model, layer)
    handle = block.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    for text in texts():
        model(input_ids=torch.tensor([text]), use_cache=False)
    handle.remove()
    x_TD = torch.cat(inputs)
    sums, counts = [0.0] * 6, [0] * 6
    for x_D in x_TD.double():
        weights_E = plain.routing_weights(x_D[None])[0]
        for expert in weights_E.nonzero().flatten().tolist():
            sums[expert] += float(weights_E[expert] * plain.expert(expert, x_D[None])[0].norm())
            counts[expert] += 1
    router = block.gate if hasattr(block, "gate") else block.router
    logits_ET = router(x_TD)[0].double().T.numpy()
    means_ED = np.stack([plain.expert(expert, x_TD.double()).mean(dim=0).numpy() for expert in range(6)])
    logit_cosines, output_cosines = (
        rows @ rows.T / np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(rows, axis=1))
        for rows in (logits_ET, means_ED)
    )
    saliency = [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
    return saliency, counts, logit_cosines, output_cosines


@pytest.mark.parametrize(("removed", "number"), [(1 / 3, 4), (0.5, 3), (5 / 6, 1)])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_half_stays_and_the_rest_joins_the_other_half(family: str, removed: float, number: int) -> None:
    model = EVERY[family]()
    layers = list(moe_blocks.sparse_blocks(model))
    plains = {layer: PlainMoE(block_of(model, layer), ROUTING[family]) for layer in layers}
    by_hand = {layer: scores_by_hand(model, layer, plains[layer]) for layer in layers}
    for similarity in ("router_logits", "expert_outputs"):
        operations, record = search(HalfMerging("reap", similarity, Budget(removed_expert_ratio=removed)), model)
        assert [operation.layer for operation in operations] == layers
        for operation in operations:
            saliency, counts, logit_cosines, output_cosines = by_hand[operation.layer]
            cosine = logit_cosines if similarity == "router_logits" else output_cosines
            assert record["saliencies"][str(operation.layer)] == pytest.approx(saliency, rel=1e-4)
            order = sorted(range(6), key=lambda e: -saliency[e])
            centers = order[number // 2 : number]
            expected = {expert: {expert} for expert in order[:number]}
            for expert in order[number:]:
                expected[max(centers, key=lambda center: cosine[expert, center])].add(expert)
            assert {group[0]: set(group) for group in operation.groups} == expected
            assert sum(len(group) == 1 for group in operation.groups) >= number // 2
            for group, shares in zip(operation.groups, operation.weights, strict=True):
                total = sum(counts[expert] for expert in group)
                assert shares == pytest.approx([counts[e] / total if total else 1 / len(group) for e in group])
    # Without the permutation the merged block is the plain one with weighted means.
    operation = type(operation)(operation.layer, operation.groups, operation.weights, align=False)
    plain = plains[operation.layer].merged(operation.groups, operation.weights)
    execute.execute(model, Plan("tiny", (operation,)))
    actual = run(block_of(model, operation.layer), tokens(2.0)).double()
    torch.testing.assert_close(actual, plain(tokens(2.0).double()), rtol=1e-4, atol=1e-4)


def test_protected_experts_stay_untouched_and_settings_are_checked() -> None:
    """Also if there are more of them than half of the groups."""
    model = EVERY["qwen2_moe"]()
    for protected in (frozenset({5}), frozenset({0, 4})):
        context = SearchContext(
            model, lambda: recorded(model), {}, 1 << 30, protected=dict.fromkeys(range(3), protected)
        )
        operations, _ = HalfMerging("frequency", budget=Budget(removed_expert_ratio=0.5)).search(context)
        for operation in operations:
            assert len(operation.groups) == 3 and {(expert,) for expert in protected} <= set(operation.groups)
    with pytest.raises(
        ValueError, match=r"method.saliency=aimer must be one of frequency, .*\nmethod.similarity=x must"
    ):
        HalfMerging("aimer", "x", Budget(0.5))
