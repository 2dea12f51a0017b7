"""The baselines against literal loops over tokens, transformers' own hidden states, and scipy."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.brute_force_moei2 import change
from support.tiny_models import FAMILIES, logits, qwen2_moe, recorded, texts, tiny, unchanged, windows
from torch import nn

from recondense.methods.dropping import Dropping
from recondense.methods.merging import Merging
from recondense.methods.naee import NAEE
from recondense.methods.saliency import SALIENCIES, SaliencyPruning
from recondense.methods.search.budget import Budget
from recondense.methods.step import SearchContext
from recondense.models import decoder, families, views
from recondense.operations import Merge
from recondense.plan import Plan
from recondense.surgery import apply
from recondense.surgery.merge import align


def search(step: Any, model: Any) -> tuple[list[Any], dict[str, Any]]:
    with unchanged(model):
        found: tuple[list[Any], dict[str, Any]] = step.search(
            SearchContext(model, lambda: recorded(model), {}, 1 << 30)
        )
    return found


@torch.no_grad()
def token_by_token(model: Any, layer: int) -> dict[str, list[float]]:
    """Saliencies by running every text alone and every expert on every token that selects it."""
    block: Any = views.get_block(model, layer)
    counts, weights, norms = ([0.0] * 6 for _ in range(3))
    seen: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for text in texts():
        model(input_ids=torch.tensor([text]))
    handle.remove()
    for x in torch.cat([each[0] for each in seen]):
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
    layers = list(views.sparse_blocks(model))
    expected = {layer: token_by_token(model, layer) for layer in layers}
    for saliency in set(SALIENCIES) - {"random"}:
        operations, record = search(SaliencyPruning(saliency, budget=Budget(removed_expert_ratio=0.5)), model)
        for layer, operation in zip(layers, operations, strict=True):
            values = expected[layer][saliency]
            assert record["saliencies"][str(layer)] == pytest.approx(values, rel=1e-4), saliency
            assert set(operation.retained) == set(sorted(range(6), key=lambda e: values[e])[3:])
    assert len({tuple(each.retained) for each in operations}) > 1


def test_global_allocation_and_seeds() -> None:
    model = qwen2_moe()
    operations, record = search(SaliencyPruning("reap", "global", Budget(0.5)), model)
    pairs = [(v, int(layer), e) for layer, values in record["saliencies"].items() for e, v in enumerate(values)]
    dropped = {(op.layer, e) for op in operations for e in range(6) if e not in op.retained}
    assert len(dropped) == 9 and all(len(op.retained) >= 2 for op in operations)
    free = {layer for layer in range(3) if sum(each[0] == layer for each in dropped) < 4}
    highest = max(value for value, layer, expert in pairs if (layer, expert) in dropped)
    assert all(value >= highest for value, layer, e in pairs if layer in free and (layer, e) not in dropped)
    plans = [
        search(SaliencyPruning("random", seed=seed, budget=Budget(removed_expert_ratio=0.5)), model)[0]
        for seed in (0, 0, 1)
    ]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_naee_is_the_enumeration_of_transformers_blocks(family: str) -> None:
    model = FAMILIES[family]()
    operations, _ = search(NAEE(budget=Budget(removed_expert_ratio=0.5)), model)
    tape = recorded(model)
    for operation in operations:
        sets = list(itertools.combinations(range(6), 3))
        best = min(sets, key=lambda each: change(model, tape, operation.layer, each))
        assert set(operation.retained) == set(range(6)) - set(best)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cosines(family: str) -> None:
    model = FAMILIES[family]()
    layers = list(views.sparse_blocks(model))
    before: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    handles = []
    for layer in layers:  # what enters the norm before the block is the residual stream there
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
    with pytest.raises(ValueError, match=r"dropping layers can save; all .* that can go give memory_ratio="):
        Dropping("layer", budget=Budget(memory_ratio=0.01)).search(
            SearchContext(model, lambda: recorded(model), {}, 1 << 30)
        )


@torch.no_grad()
def test_twins_end_in_one_group_and_merge_into_themselves() -> None:
    """An expert and its copy with permuted rows: found by their outputs, put together by the alignment."""
    model = qwen2_moe()
    block: Any = views.get_block(model, 1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate, up = block.experts.gate_up_proj[4].chunk(2)
        block.experts.gate_up_proj[1] = torch.cat((gate[order], up[order]))
        block.experts.down_proj[1] = block.experts.down_proj[4][:, order]
        block.gate.weight[1] = 1.01 * block.gate.weight[4]
    weights = views.sparse_blocks(model)[1].weights
    mine, theirs = weights.projections(4), align(weights.projections(4), weights.projections(1))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    for grouping in ("router_logits", "expert_outputs"):
        operations, _ = search(Merging(grouping, budget=Budget(removed_expert_ratio=1 / 6)), model)
        assert any({1, 4} <= set(group) for each in operations if each.layer == 1 for group in each.groups), grouping
    groups = ((0,), (4, 1), (2,), (3,), (5,))
    weights = ((1.0,), (0.3, 0.7), (1.0,), (1.0,), (1.0,))
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    expected = block(x)
    apply.execute(model, Plan("tiny", (Merge(1, groups, weights, align=True),)))
    torch.testing.assert_close(views.get_block(model, 1)(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_equal_experts_are_merged_into_as_many_groups_as_asked() -> None:
    """Upcycled experts: all distances are the same, and a cut by height would leave one group."""
    model = qwen2_moe()
    for block in views.sparse_blocks(model).values():
        for weight in (block.weights.gate_up_EHD, block.weights.down_EDF):
            weight.copy_(weight[:1].expand_as(weight))
    operations, _ = search(Merging("expert_outputs", budget=Budget(removed_expert_ratio=0.5)), model)
    assert [len(each.groups) for each in operations] == [3, 3, 3]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_groups_by_hand(family: str) -> None:
    """Average linkage written out; dominant experts are the most frequent of all layers, one a layer at least."""
    model = FAMILIES[family]()
    tape = recorded(model)
    operations, record = search(Merging("expert_outputs", budget=Budget(removed_expert_ratio=0.5)), model)
    for operation in operations:
        block = views.sparse_blocks(model)[operation.layer]
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
        assert {frozenset(group) for group in operation.groups} == {frozenset(each) for each in clusters}
        counts = record["selected"][str(operation.layer)]
        for group, shares in zip(operation.groups, operation.weights, strict=True):
            total = sum(counts[expert] for expert in group)
            assert shares == pytest.approx([counts[e] / total if total else 1 / len(group) for e in group])
    layers = list(views.sparse_blocks(model))
    operations, record = search(Merging("router_logits", budget=Budget(removed_expert_ratio=0.5)), model)
    kept = {op.layer: len(op.groups) for op in operations}
    assert sum(kept.get(layer, 6) for layer in layers) == 3 * len(layers)
    for op in operations:
        counts = record["selected"][str(op.layer)]
        leaders = {group[0] for group in op.groups}
        assert min(counts[e] for e in leaders) >= max((counts[e] for e in range(6) if e not in leaders), default=0)


def test_refusals() -> None:
    facts = families.facts(qwen2_moe().config)
    assert "at most 0.6667" in SaliencyPruning("reap", budget=Budget(removed_expert_ratio=0.8)).check(facts)[0]
    assert "at most 0.6667" in NAEE(budget=Budget(removed_expert_ratio=0.8)).check(facts)[0]
    assert "at most 0.8333" in Merging("router_logits", budget=Budget(removed_expert_ratio=0.9)).check(facts)[0]
    for make in (lambda: SaliencyPruning("size", "odd"), lambda: Merging("size"), lambda: Dropping("head")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="both null"):
            make()


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("saliency", ["frequency", "reap"])
def test_every_group_loses_as_many_its_least_salient(saliency: str, allocation: str) -> None:
    """A router that selects groups first needs them equal; a token selects two experts out of one group of four."""
    model = tiny("deepseek_v3", n_routed_experts=8, n_group=2, topk_group=1)
    step = SaliencyPruning(
        saliency, allocation, budget=Budget(removed_expert_ratio=0.2)
    )  # of 16: three, so two in each group
    assert step.check(families.facts(model.config)) == []
    operations, record = search(step, model)
    scores = {int(layer): values for layer, values in record["saliencies"].items()}
    gone = {each.layer: sorted(set(range(8)) - set(each.retained)) for each in operations}
    assert sum(map(len, gone.values())) == 4
    for layer, dropped in gone.items():
        groups = [[expert for expert in dropped if expert // 4 == group] for group in (0, 1)]
        assert len(groups[0]) == len(groups[1]) in ((1,) if allocation == "uniform" else (1, 2))
        for group, own in enumerate(groups):
            assert own == sorted(sorted(range(4 * group, 4 * group + 4), key=lambda e: scores[layer][e])[: len(own)])
    apply.execute(model, Plan("tiny", tuple(operations)))
    assert torch.isfinite(logits(model, windows(2, 9))).all()
    [problem] = SaliencyPruning(saliency, budget=Budget(removed_expert_ratio=0.6)).check(families.facts(model.config))
    assert "selects 2 out of 1 of 2 groups: at most 0.5 can go" in problem
