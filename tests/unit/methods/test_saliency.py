"""Saliencies against literal loops over tokens, and the experts that they prune."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.searched import plan_of
from support.step_search import search
from support.tiny_models import EVERY, FAMILIES, logits, qwen2_moe, recorded, texts, tiny, unchanged, windows
from torch import nn

from recondense.methods.saliency import SaliencyPruning
from recondense.methods.search.budget import Budget
from recondense.methods.search.expert_scores import SALIENCIES, WITHOUT_TEXTS, few_tokens, name_experts
from recondense.methods.step import SearchContext
from recondense.models import families, moe_blocks
from recondense.plan import Plan
from recondense.surgery import execute


@torch.no_grad()
def saliencies_token_by_token(model: Any, layer: int) -> dict[str, list[float]]:
    """Saliencies by running every text alone and every expert on every token that selects it."""
    block: Any = moe_blocks.get_block(model, layer)
    counts, weights, norms, plain, squares = ([0.0] * 6 for _ in range(5))
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
            plain[expert] += float(y.norm())
            squares[expert] += float(y @ y)
    means = {
        name: [total / max(count, 1) for total, count in zip(totals, counts, strict=True)]
        for name, totals in {"reap": norms, "man": plain, "msan": squares}.items()
    }
    return {"frequency": counts, "routing_weight": weights, "expert_drop": norms, **means}


@pytest.mark.parametrize("family", FAMILIES)
def test_saliencies(family: str) -> None:
    model = FAMILIES[family]()
    layers = list(moe_blocks.sparse_blocks(model))
    expected = {layer: saliencies_token_by_token(model, layer) for layer in layers}
    for saliency in set(SALIENCIES) - set(WITHOUT_TEXTS):
        operations, record = search(SaliencyPruning(saliency, budget=Budget(removed_expert_ratio=0.5)), model)
        for layer, operation in zip(layers, operations, strict=True):
            values = expected[layer][saliency]
            assert record["saliencies"][str(layer)] == pytest.approx(values, rel=1e-4), saliency
            assert set(operation.retained) == set(sorted(range(6), key=lambda e: values[e])[3:])
            assert record["selected"][str(layer)] == expected[layer]["frequency"]
    assert len({tuple(operation.retained) for operation in operations}) > 1


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_aimer_reads_the_weights_alone(family: str) -> None:
    """The experts of a layer whose weights are most equal in size go first; no text is read."""
    model = EVERY[family]()
    step = SaliencyPruning("aimer", budget=Budget(removed_expert_ratio=0.5))
    operations, record = step.search(SearchContext(model, lambda: pytest.fail("a tape was recorded"), {}, 1 << 30))
    for operation in operations:
        experts: Any = moe_blocks.sparse_blocks(model)[operation.layer].experts
        values = [
            np.concatenate([experts.gate_up_proj[e].detach().flatten(), experts.down_proj[e].detach().flatten()])
            for e in range(6)
        ]
        aimer = [np.abs(w).mean(dtype=np.float64) / np.sqrt(np.square(w, dtype=np.float64).mean()) for w in values]
        assert record["saliencies"][str(operation.layer)] == pytest.approx([1 / value for value in aimer], rel=1e-9)
        assert set(operation.retained) == set(sorted(range(6), key=lambda e: -aimer[e])[3:])
    assert len({tuple(operation.retained) for operation in operations}) > 1


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_propagated_saliencies(family: str, tmp_path: Path) -> None:
    """Against a copy that is pruned layer by layer and run from its token ids by transformers' own forward."""
    model, twin = FAMILIES[family](), FAMILIES[family]()
    step = SaliencyPruning("reap", propagate=True, budget=Budget(removed_expert_ratio=0.5))
    cache: dict[str, Any] = {}
    with unchanged(model):
        operations, record = step.search(SearchContext(model, lambda: recorded(model), cache, 1 << 30))
    for operation in operations:
        values = saliencies_token_by_token(twin, operation.layer)["reap"]
        assert record["saliencies"][str(operation.layer)] == pytest.approx(values, rel=1e-4)
        assert set(operation.retained) == set(sorted(range(6), key=lambda e: values[e])[3:])
        execute.execute(twin, Plan("tiny", (operation,)))
    plain = search(SaliencyPruning("reap", budget=Budget(removed_expert_ratio=0.5)), model)[1]["saliencies"]
    first, *others = (str(operation.layer) for operation in operations)
    assert record["saliencies"][first] == plain[first]
    assert all(record["saliencies"][layer] != pytest.approx(plain[layer], rel=1e-3) for layer in others)
    # A search that was interrupted after the first layer goes on; another budget below is another state.
    [name] = [name for name in cache if name.startswith(f"propagated-{int(first):03d}")]
    resumed = step.search(SearchContext(model, lambda: recorded(model), {name: cache[name]}, 1 << 30))
    assert resumed[0] == operations and resumed[1]["saliencies"] == record["saliencies"]
    without = SearchContext(model, lambda: pytest.fail("everything is cached"), cache, 1 << 30)
    assert step.search(without)[0] == operations
    other = SaliencyPruning("reap", propagate=True, budget=Budget(removed_expert_ratio=0.34))
    again = other.search(SearchContext(model, lambda: recorded(model), cache, 1 << 30))[1]["saliencies"]
    assert again[first] == record["saliencies"][first] and again[others[0]] != record["saliencies"][others[0]]
    with pytest.raises(ValueError, match=r"method.propagate=true: allocation=global .* use method.allocation=uniform"):
        SaliencyPruning("reap", "global", propagate=True, budget=Budget(0.5))
    plan = plan_of(FAMILIES[family](), "reap", tmp_path, "method.propagate=true", "method.removed_expert_ratio=0.5")
    assert list(plan.operations) == operations


def test_experts_with_few_tokens_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = qwen2_moe()
    with torch.no_grad():
        moe_blocks.sparse_blocks(model)[1].router.weight[3].zero_()  # type: ignore[index]
    with caplog.at_level(logging.WARNING):
        _, record = search(SaliencyPruning("man", budget=Budget(removed_expert_ratio=0.5)), model)
    counts = {layer: saliencies_token_by_token(model, layer)["frequency"] for layer in range(3)}
    expected = {str(layer): [e for e in range(6) if counts[layer][e] < 10] for layer in counts}
    assert record["few_tokens"] == {layer: experts for layer, experts in expected.items() if experts} != {}
    [message] = [entry.getMessage() for entry in caplog.records]
    number, never = sum(map(len, expected.values())), sum(values.count(0) for values in counts.values())
    assert message.startswith(f"{number} of 18 experts are selected by fewer than 10 calibration tokens")
    assert (f", {never} of them by none" in message) == (never > 0)
    layer, experts = next(iter(record["few_tokens"].items()))
    assert f"layer {layer}: {', '.join(map(str, experts))}" in message and "data.calibration.num_samples" in message
    assert few_tokens({0: [10, 11], 2: [9, 10]}) == {2: [0]}
    assert name_experts({1: [4, 5], 3: [0, 7, 8]}, most=3) == "layer 1: 4, 5; layer 3: 0, ..."


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
