"""The brute force that the search is compared with is right itself: closed forms, and models with a known answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon  # type: ignore[import-untyped]
from support import brute_force as bf
from support.agreement import Agreement, compare
from torch import nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

NUM_EXPERTS = 6


def qwen(top_k: int = 2) -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, moe_intermediate_size=16, shared_expert_intermediate_size=24, num_experts=NUM_EXPERTS,
        num_experts_per_tok=top_k, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config)
    return model.eval()


def deepseek(top_k: int = 2) -> DeepseekV2ForCausalLM:
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, moe_intermediate_size=16, n_routed_experts=NUM_EXPERTS, num_experts_per_tok=top_k,
        n_shared_experts=2, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, routed_scaling_factor=1.5, topk_method="greedy", initializer_range=0.3,
        max_position_embeddings=64, n_group=1, topk_group=1,
    )  # fmt: skip
    return DeepseekV2ForCausalLM(config).eval()


def texts(num: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (length,), generator=generator).tolist() for length in range(3, 3 + 2 * num, 2)]


FAMILIES: dict[str, Callable[..., Any]] = {"qwen2_moe": qwen, "deepseek_v2": deepseek}


def test_jensen_shannon_is_scipys() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(7, 40), torch.randn(7, 40)
    ours = bf.jensen_shannon(a, b).numpy()
    p, q = a.double().softmax(-1).numpy(), b.double().softmax(-1).numpy()
    np.testing.assert_allclose(ours, [jensenshannon(x, y) ** 2 for x, y in zip(p, q, strict=True)], rtol=1e-6)
    np.testing.assert_allclose(bf.jensen_shannon(a, b, torch.float32), ours, rtol=1e-4)
    assert bf.jensen_shannon(a, a).abs().max() == 0
    far = bf.jensen_shannon(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]]))
    assert far.item() == pytest.approx(np.log(2), rel=1e-6)  # disjoint, so the divergence is the largest possible


def test_every_text_has_the_same_weight() -> None:
    torch.manual_seed(0)
    short, long = torch.randn(2, 8), torch.randn(6, 8)
    other = [torch.randn(2, 8), long]
    assert bf.score([short, long], other) == pytest.approx(bf.jensen_shannon(short, other[0]).mean().item() / 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_by_hand(family: str) -> None:
    """From the router's definition, text by text without padding, against the hooks on padded batches."""
    model, ids = FAMILIES[family](), texts()
    layer = bf.moe_layers(model)[-1]
    block = bf.block_of(model, layer)
    weights: list[list[float]] = [[] for _ in range(NUM_EXPERTS)]
    gates: list[float] = []

    def note_routing(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0][0].double()
        for probabilities in (x @ block.gate.weight.double().T).softmax(-1):
            for expert in probabilities.argsort(descending=True)[:2].tolist():
                weights[expert].append(probabilities[expert].item() * (1.5 if family == "deepseek_v2" else 1))
        if family == "qwen2_moe":
            gates.extend(block.shared_expert_gate.double()(x).sigmoid().flatten().tolist())
            block.shared_expert_gate.float()

    statistics = bf.statistics(model, ids, batch_size=3)[layer]
    hook = block.register_forward_pre_hook(note_routing)
    with torch.no_grad():
        for text in ids:
            model(input_ids=torch.tensor([text]))
    hook.remove()
    assert statistics.selected == [len(w) for w in weights]
    assert sum(statistics.selected) == 2 * sum(len(text) for text in ids)
    assert statistics.coefficients == [pytest.approx(np.mean(w), rel=1e-5) if w else None for w in weights]
    assert statistics.shared_gate_mean == (pytest.approx(np.mean(gates), rel=1e-6) if gates else None)
    assert bf.moe_layers(model) == ([0, 1, 2] if family == "qwen2_moe" else [1, 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_condensing_everything_under_constant_routing_changes_nothing(family: str) -> None:
    """With a router of zeros and top_k = E, every expert has the weight 1/E for every token: condensed = original."""
    model, ids = FAMILIES[family](top_k=NUM_EXPERTS), texts()
    for layer in bf.moe_layers(model):
        nn.init.zeros_(bf.block_of(model, layer).gate.weight)
    stats, layers = bf.statistics(model, ids), bf.moe_layers(model)
    everything = list(range(NUM_EXPERTS))
    scale = 1.5 if family == "deepseek_v2" else 1.0
    assert stats[layers[0]].coefficients == pytest.approx([scale / NUM_EXPERTS] * NUM_EXPERTS)
    original = bf.states_after(model, layers, ids)
    with bf.condensed(model, layers[0], everything, stats[layers[0]], "token"):
        condensed = bf.states_after(model, layers, ids)
    for layer in layers:
        for a, b in zip(original[layer], condensed[layer], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert bf.score(original[layer], condensed[layer]) < 1e-9
    with bf.condensed(model, layers[0], everything[1:], stats[layers[0]], "token"):
        assert bf.score(original[layers[0]], bf.states_after(model, layers, ids)[layers[0]]) > 1e-6


def test_shared_gate_mean_is_a_constant() -> None:
    model, ids = qwen(), texts()
    stats = bf.statistics(model, ids)[1]
    x = torch.randn(1, 4, 32)
    block = bf.block_of(model, 1)
    with torch.no_grad(), bf.condensed(model, 1, [], stats, "mean"):
        torch.testing.assert_close(block(x), stats.shared_gate_mean * block.shared_expert(x))
    with torch.no_grad(), bf.condensed(model, 1, [], stats, "token"):
        torch.testing.assert_close(block(x), block.shared_expert_gate(x).sigmoid() * block.shared_expert(x))


def test_padding_batches_and_the_head_do_not_matter() -> None:
    model, ids = qwen(), texts()
    one = bf.states_after(model, [0, 2], ids, batch_size=1, lm_head=False)
    for batch_size, lm_head in ((2, True), (8, False)):
        many = bf.states_after(model, [0, 2], ids, batch_size=batch_size, lm_head=lm_head)
        for layer in (0, 2):
            assert [tuple(t.shape) for t in many[layer]] == [(len(text), 32) for text in ids]
            for a, b in zip(one[layer], many[layer], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # the state of the last layer is taken after the final norm
        last = model.model(input_ids=torch.tensor([ids[0]])).last_hidden_state[0]
    torch.testing.assert_close(one[2][0], last, rtol=1e-4, atol=1e-4)


def test_expert_search_counts_and_agrees_with_enumeration() -> None:
    model, ids = qwen(), texts(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stats = bf.statistics(model, ids)[1]
    original = bf.states_after(model, [1], ids)[1]
    order = bf.expert_search(model, ids, 1, 2, stats, batch_size=2)
    assert order.count.passes == 1 + 6 + 5
    assert order.count.head_calls == order.count.passes * 2
    experts: list[int] = []
    for step in range(2):
        scores = {}
        for expert in set(range(NUM_EXPERTS)) - set(experts):
            with bf.condensed(model, 1, [*experts, expert], stats):
                scores[expert] = bf.score(original, bf.states_after(model, [1], ids, batch_size=8)[1])
        assert order.candidates[step] == pytest.approx(scores, rel=1e-4)
        experts.append(min(scores, key=lambda e: (scores[e], e)))
    assert order.order == experts
    assert order.order[:1] == bf.expert_search(model, ids, 1, 1, stats).order
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    again = bf.states_after(model, [1], ids)[1]
    assert bf.score(original, again) == 0, "the search changed the model"


def test_the_expert_that_matters_is_first_and_the_lowest_of_equals_wins() -> None:
    """Constant routing; experts 2 and 4 are equal and strong, the others zero."""
    model, ids = qwen(top_k=NUM_EXPERTS), texts(2)
    block = bf.block_of(model, 1)
    nn.init.zeros_(block.gate.weight)
    with torch.no_grad():
        block.experts.down_proj[[0, 1, 3, 5]] = 0
        block.experts.gate_up_proj[4] = block.experts.gate_up_proj[2]
        block.experts.down_proj[4] = block.experts.down_proj[2]
    order = bf.expert_search(model, ids, 1, 3, bf.statistics(model, ids)[1], shared_gate="token")
    assert order.candidates[0][2] == order.candidates[0][4]
    assert order.order == [2, 4, 0]
    assert order.start > order.js[0] > 1e-6 > order.js[1]


def test_an_expert_never_selected_is_no_candidate() -> None:
    model, ids = qwen(top_k=1), texts()
    gate = bf.block_of(model, 0).gate
    with torch.no_grad():
        gate.weight[1] = -gate.weight[0]  # one of the two logits is positive, so expert 3 never wins
        gate.weight[3] = 0
    stats = bf.statistics(model, ids)[0]
    assert stats.coefficients[3] is None and stats.selected[3] == 0
    known = sum(c is not None for c in stats.coefficients)
    assert 3 not in bf.expert_search(model, ids, 0, 1, stats).candidates[0]
    assert 3 not in bf.routing_weight_order(stats, known)
    with pytest.raises(ValueError, match="selected only"):
        bf.routing_weight_order(stats, known + 1)
    with pytest.raises(ValueError, match="candidates"):
        bf.expert_search(model, ids, 0, known + 1, stats)
    with pytest.raises(ValueError, match="no token selected"), bf.condensed(model, 0, [3], stats):
        pass


def test_routing_weight_order() -> None:
    stats = bf.Statistics([0.1, 0.3, None, 0.3, 0.2], [1, 1, 0, 1, 1], None)
    assert bf.routing_weight_order(stats, 4) == [1, 3, 4, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_search(family: str) -> None:
    model, ids = FAMILIES[family](), texts()
    stats, layers = bf.statistics(model, ids), bf.moe_layers(model)
    experts = {layer: bf.routing_weight_order(stats[layer], 2) for layer in layers}
    order = bf.layer_search(model, ids, len(layers), experts, stats)
    assert sorted(order.order) == layers
    assert order.count.passes == sum(range(1, len(layers) + 1))
    assert order.count.layer_runs == 3 * order.count.passes
    assert order.count.head_calls == 0
    assert [min(step.values()) for step in order.candidates] == order.js
    original = bf.states_after(model, [2], ids)[2]
    with bf.condensed(model, order.order[0], experts[order.order[0]], stats[order.order[0]]):
        assert order.js[0] == pytest.approx(bf.score(original, bf.states_after(model, [2], ids)[2]), rel=1e-4)
    with pytest.raises(ValueError, match="candidates"):
        bf.layer_search(model, ids, 4, experts, stats)


def test_compare_orders() -> None:
    """Either candidate of a tie is right; elsewhere the choice must be the same. Scores must always be equal."""
    steps = [{0: 0.50, 1: 0.40000001, 2: 0.4}, {0: 0.3, 1: 0.1}]
    expected = bf.Order([2, 1], [0.4, 0.1], steps, 1.0, bf.Count(1, 1))
    assert compare(expected, [2, 1], [0.4, 0.1]) == Agreement(True, 0, 0.0, ())
    tie = compare(expected, [1, 2], [0.40000001, 0.1])
    assert tie.same_plan and tie.num_ties == 1 and not tie.same_order
    assert "chose 0" in compare(expected, [0, 1], [0.5, 0.1]).problems[1]
    assert "chose 0" in compare(expected, [2, 0], [0.4, 0.1]).problems[0]
    assert "score 0.11" in compare(expected, [2, 1], [0.4, 0.11]).problems[0]
    assert "1 choices" in compare(expected, [2], [0.4]).problems[0]
