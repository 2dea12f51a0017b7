"""Merging: twins, equal experts, and groups by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.step_search import search
from support.tiny_models import FAMILIES, qwen2_moe, recorded
from torch import nn

from recondense.methods.merging import Merging
from recondense.methods.search.budget import Budget
from recondense.models import moe_blocks
from recondense.operations import Merge
from recondense.plan import Plan
from recondense.surgery import execute
from recondense.surgery.merge import align


@torch.no_grad()
def test_twins_end_in_one_group_and_merge_into_themselves() -> None:
    """An expert and its copy with permuted rows: grouped by their outputs, merged exactly after alignment."""
    model = qwen2_moe()
    block: Any = moe_blocks.get_block(model, 1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate, up = block.experts.gate_up_proj[4].chunk(2)
        block.experts.gate_up_proj[1] = torch.cat((gate[order], up[order]))
        block.experts.down_proj[1] = block.experts.down_proj[4][:, order]
        block.gate.weight[1] = 1.01 * block.gate.weight[4]
    weights = moe_blocks.sparse_blocks(model)[1].weights
    projections, aligned = weights.projections(4), align(weights.projections(4), weights.projections(1))
    assert projections.keys() == aligned.keys() and all(
        torch.equal(projections[name], aligned[name]) for name in projections
    )
    for grouping in ("router_logits", "expert_outputs"):
        operations, _ = search(Merging(grouping, budget=Budget(removed_expert_ratio=1 / 6)), model)
        assert any(
            {1, 4} <= set(group) for operation in operations if operation.layer == 1 for group in operation.groups
        ), grouping
    groups = ((0,), (4, 1), (2,), (3,), (5,))
    weights = ((1.0,), (0.3, 0.7), (1.0,), (1.0,), (1.0,))
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    expected = block(x)
    execute.execute(model, Plan("tiny", (Merge(1, groups, weights, align=True),)))
    torch.testing.assert_close(moe_blocks.get_block(model, 1)(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_equal_experts_are_merged_into_the_requested_number_of_groups() -> None:
    """Upcycled experts: all distances are equal, and a cut by height would give a single group."""
    model = qwen2_moe()
    for block in moe_blocks.sparse_blocks(model).values():
        for weight in (block.weights.gate_up_EHD, block.weights.down_EDF):
            weight.copy_(weight[:1].expand_as(weight))
    operations, _ = search(Merging("expert_outputs", budget=Budget(removed_expert_ratio=0.5)), model)
    assert [len(operation.groups) for operation in operations] == [3, 3, 3]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_groups_by_hand(family: str) -> None:
    """Average linkage written out; dominant experts are the most frequent of all layers, at least one per layer."""
    model = FAMILIES[family]()
    tape = recorded(model)
    operations, record = search(Merging("expert_outputs", budget=Budget(removed_expert_ratio=0.5)), model)
    for operation in operations:
        block = moe_blocks.sparse_blocks(model)[operation.layer]
        x = torch.cat([trace.x_TD for trace in tape.trace(model, operation.layer)])
        means = []
        for expert in range(6):
            gate, up = (x @ block.weights.gate_up_EHD[expert].T).chunk(2, dim=-1)
            y = (nn.functional.silu(gate) * up) @ block.weights.down_EDF[expert].T
            means.append(y.double().mean(dim=0))
        clusters = [{expert} for expert in range(6)]
        while len(clusters) > 3:
            one, other = min(
                itertools.combinations(range(len(clusters)), 2),
                key=lambda pair: (
                    sum(float((means[a] - means[b]).norm()) for a in clusters[pair[0]] for b in clusters[pair[1]])
                    / (len(clusters[pair[0]]) * len(clusters[pair[1]]))
                ),
            )
            clusters[one] |= clusters.pop(other)
        assert {frozenset(group) for group in operation.groups} == {frozenset(cluster) for cluster in clusters}
        counts = record["selected"][str(operation.layer)]
        for group, shares in zip(operation.groups, operation.weights, strict=True):
            total = sum(counts[expert] for expert in group)
            assert shares == pytest.approx([counts[e] / total if total else 1 / len(group) for e in group])
    layers = list(moe_blocks.sparse_blocks(model))
    operations, record = search(Merging("router_logits", budget=Budget(removed_expert_ratio=0.5)), model)
    num_groups = {op.layer: len(op.groups) for op in operations}
    assert sum(num_groups.get(layer, 6) for layer in layers) == 3 * len(layers)
    for op in operations:
        counts = record["selected"][str(op.layer)]
        leaders = {group[0] for group in op.groups}
        assert min(counts[e] for e in leaders) >= max((counts[e] for e in range(6) if e not in leaders), default=0)
