"""Saliencies against literal loops over tokens, and the experts that they prune."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.step_search import search
from support.tiny_models import FAMILIES, logits, qwen2_moe, texts, tiny, windows
from torch import nn

from recondense.methods.saliency import SALIENCIES, SaliencyPruning
from recondense.methods.search.budget import Budget
from recondense.models import families, moe_blocks
from recondense.plan import Plan
from recondense.surgery import execute


@torch.no_grad()
def saliencies_token_by_token(model: Any, layer: int) -> dict[str, list[float]]:
    """Saliencies by running every text alone and every expert on every token that selects it."""
    block: Any = moe_blocks.get_block(model, layer)
    counts, weights, norms = ([0.0] * 6 for _ in range(3))
    seen: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for text in texts():
        model(input_ids=torch.tensor([text]))
    handle.remove()
    for x in torch.cat([hidden_states[0] for hidden_states in seen]):
        _, top_weights, top_index = block.gate(x[None])
        for weight, expert in zip(top_weights[0].tolist(), top_index[0].tolist(), strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ x).chunk(2)
            y = block.experts.down_proj[expert] @ (nn.functional.silu(gate) * up)
            counts[expert] += 1
            weights[expert] += weight
            norms[expert] += weight * float(y.norm())
    reap = [norm / max(count, 1) for norm, count in zip(norms, counts, strict=True)]
    return {"frequency": counts, "routing_weight": weights, "expert_drop": norms, "reap": reap}


@pytest.mark.parametrize("family", FAMILIES)
def test_saliencies(family: str) -> None:
    model = FAMILIES[family]()
    layers = list(moe_blocks.sparse_blocks(model))
    expected = {layer: saliencies_token_by_token(model, layer) for layer in layers}
    for saliency in set(SALIENCIES) - {"random"}:
        operations, record = search(SaliencyPruning(saliency, budget=Budget(removed_expert_ratio=0.5)), model)
        for layer, operation in zip(layers, operations, strict=True):
            values = expected[layer][saliency]
            assert record["saliencies"][str(layer)] == pytest.approx(values, rel=1e-4), saliency
            assert set(operation.retained) == set(sorted(range(6), key=lambda e: values[e])[3:])
    assert len({tuple(operation.retained) for operation in operations}) > 1


def test_global_allocation_and_seeds() -> None:
    model = qwen2_moe()
    operations, record = search(SaliencyPruning("reap", "global", Budget(0.5)), model)
    pairs = [(v, int(layer), e) for layer, values in record["saliencies"].items() for e, v in enumerate(values)]
    dropped = {(op.layer, e) for op in operations for e in range(6) if e not in op.retained}
    assert len(dropped) == 9 and all(len(op.retained) >= 2 for op in operations)
    free = {layer for layer in range(3) if sum(dropped_layer == layer for dropped_layer, _ in dropped) < 4}
    highest = max(value for value, layer, expert in pairs if (layer, expert) in dropped)
    assert all(value >= highest for value, layer, e in pairs if layer in free and (layer, e) not in dropped)
    plans = [
        search(SaliencyPruning("random", seed=seed, budget=Budget(removed_expert_ratio=0.5)), model)[0]
        for seed in (0, 0, 1)
    ]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("saliency", ["frequency", "reap"])
def test_every_group_loses_equally_many_of_its_least_salient_experts(saliency: str, allocation: str) -> None:
    """Routers that select groups first need groups of equal size; a token selects two of the four in one group."""
    model = tiny("deepseek_v3", n_routed_experts=8, n_group=2, topk_group=1)
    step = SaliencyPruning(
        saliency, allocation, budget=Budget(removed_expert_ratio=0.2)
    )  # three of 16, rounded up to two in each group
    assert step.check(families.facts(model.config)) == []
    operations, record = search(step, model)
    scores = {int(layer): values for layer, values in record["saliencies"].items()}
    by_layer = {operation.layer: sorted(set(range(8)) - set(operation.retained)) for operation in operations}
    assert sum(map(len, by_layer.values())) == 4
    for layer, dropped in by_layer.items():
        groups = [[expert for expert in dropped if expert // 4 == group] for group in (0, 1)]
        assert len(groups[0]) == len(groups[1]) in ((1,) if allocation == "uniform" else (1, 2))
        for group, experts in enumerate(groups):
            assert experts == sorted(
                sorted(range(4 * group, 4 * group + 4), key=lambda e: scores[layer][e])[: len(experts)]
            )
    execute.execute(model, Plan("tiny", tuple(operations)))
    assert torch.isfinite(logits(model, windows(2, 9))).all()
    [problem] = SaliencyPruning(saliency, budget=Budget(removed_expert_ratio=0.6)).check(families.facts(model.config))
    assert "at most 0.5, because each token selects 2 of the 8 experts of a layer, from 1 of 2 groups" in problem
