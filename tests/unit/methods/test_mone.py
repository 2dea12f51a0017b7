"""MoNE's scores against a loop over tokens, and its budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.plain_moe import ROUTING, PlainMoE, block_of
from support.step_search import search
from support.tiny_models import EVERY, recorded, texts
from torch import Tensor

from recondense.methods.mone import MoNE
from recondense.methods.search.budget import Budget
from recondense.models import families, moe_blocks
from recondense.models.parameters import sizes
from recondense.plan import Plan
from recondense.surgery import execute


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_scores_are_frequency_times_fluctuation(family: str) -> None:
    model = EVERY[family]()
    operations, record = search(MoNE(Budget(removed_expert_ratio=0.4)), model)
    numbers = []
    for layer in moe_blocks.sparse_blocks(model):
        plain = PlainMoE(block_of(model, layer), ROUTING[family])
        inputs: list[Tensor] = []
        handle = block_of(model, layer).register_forward_pre_hook(
            lambda module, args, seen=inputs: seen.append(args[0][0])
        )
        for text in texts():
            model(input_ids=torch.tensor([text]), use_cache=False)
        handle.remove()
        outputs: dict[int, list[Any]] = {expert: [] for expert in range(6)}
        num_tokens = 0
        for x_D in torch.cat(inputs).double():
            num_tokens += 1
            for expert in plain.routing_weights(x_D[None])[0].nonzero().flatten().tolist():
                outputs[expert].append(plain.expert(expert, x_D[None])[0].numpy())
        scores = []
        for values in outputs.values():
            deviations = np.std(values, axis=0, ddof=1) if len(values) > 1 else np.zeros(32)
            scores.append(len(values) / num_tokens * np.linalg.norm(deviations))
        assert record["saliencies"][str(layer)] == pytest.approx(scores, rel=1e-4)
        [retained] = [operation.retained for operation in operations if operation.layer == layer]
        numbers.append(6 - len(retained))
        assert set(retained) == set(sorted(range(6), key=lambda e: scores[e])[6 - len(retained) :])
    assert max(numbers) - min(numbers) <= 1
    assert len({operation.retained for operation in operations}) > 1


@pytest.mark.parametrize("budget", [Budget(removed_expert_ratio=0.5), Budget(memory_ratio=0.8)])
def test_the_constants_count_in_the_budget(budget: Budget) -> None:
    """Half of the experts would not be enough: their constants remain."""
    model = EVERY["qwen2_moe"]()
    before = sizes(model)
    operations, _ = search(MoNE(budget), model)
    execute.execute(model, Plan("tiny", tuple(operations)), lambda: recorded(model))
    after, unit = sizes(model), 3 * 32 * 16 - 32
    if budget.memory_ratio:
        assert after["total"] <= 0.8 * before["total"] < after["total"] + unit
    else:
        assert after["routed_experts"] <= 0.5 * before["routed_experts"] < after["routed_experts"] + unit
        assert sum(6 - len(operation.retained) for operation in operations) == 10
    facts = families.facts(model.config)
    [problem] = MoNE(Budget(removed_expert_ratio=0.82)).check(facts)
    assert "must be at most 0.816, because at least one of the 6 experts" in problem
    assert MoNE(Budget(removed_expert_ratio=0.81)).check(facts) == []
