"""The parts of MoE-I² against brute force on transformers' blocks, and the complete method."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.brute_force_moei2 import best_of_block, change, loss_without
from support.tiny_models import FAMILIES, blocks, deepseek_v2, qwen2_moe, recorded, texts, unchanged
from transformers import AutoModelForCausalLM, DeepseekV2Config

from recondense.calibration.tape import Tape
from recondense.files import JsonFolder
from recondense.methods.decompose import Decompose
from recondense.methods.moei2 import InterExpertPruning
from recondense.methods.search import ranks
from recondense.methods.search.allocation import drop_by_importance
from recondense.methods.search.budget import Budget
from recondense.methods.search.genetic import Genetic, best_sets
from recondense.methods.search.importance import expert_importance
from recondense.methods.search.kt_field import reception_field
from recondense.methods.search.leave_out import LeaveOutScorer
from recondense.methods.step import SearchContext
from recondense.models import decoder, families, moe_blocks, parameters
from recondense.models.parameters import sizes
from recondense.operations import Factorize, Prune
from recondense.plan import Plan
from recondense.surgery import execute

MODELS: dict[str, Any] = {**FAMILIES, "normalized": lambda: qwen2_moe(norm_topk_prob=True)}
NAMES = ("gate_proj", "up_proj", "down_proj")


def dropped_masks(sets: list[tuple[int, ...]], num_experts: int) -> torch.Tensor:
    return torch.tensor([[expert in experts for expert in range(num_experts)] for experts in sets])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_error_of_a_set_is_that_of_transformers_block_without_it(name: str) -> None:
    model = MODELS[name]()
    tape, block = recorded(model), moe_blocks.sparse_blocks(model)[2]
    sets = [experts for number in range(5) for experts in itertools.combinations(range(6), number)]
    with unchanged(model):
        replay = LeaveOutScorer.prepare(model, tape, block, 4, 1 << 30)
        errors = replay.errors(dropped_masks(sets, 6)).tolist()
        little = LeaveOutScorer.prepare(model, tape, block, 4, 1 << 10)
        assert little._grams is None and replay._grams is not None
        assert little.errors(dropped_masks(sets, 6)).tolist() == pytest.approx(errors, rel=1e-5, abs=1e-4)
    assert errors[0] < 1e-6 * max(errors)
    for experts, error in zip(sets, errors, strict=True):
        assert error == pytest.approx(change(model, tape, 2, experts), rel=1e-3, abs=1e-4), experts
    # An error does not depend on how many experts other sets may drop.
    assert LeaveOutScorer.prepare(model, tape, block, 1, 1 << 30).errors(
        dropped_masks(sets[:7], 6)
    ).tolist() == pytest.approx(errors[:7], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_importance_is_the_change_without_the_expert(name: str) -> None:
    model = MODELS[name]()
    tape, block = recorded(model), moe_blocks.sparse_blocks(model)[1]
    with unchanged(model):
        raw = expert_importance(model, tape, block, "layer_output", False, 1 << 30)
        relative = expert_importance(model, tape, block, "layer_output", True, 1 << 30)
        losses = expert_importance(model, tape, block, "lm_loss", False, 1 << 30)
    assert raw == pytest.approx([change(model, tape, 1, [expert]) for expert in range(6)], rel=1e-3)
    norm = float(torch.cat([trace.output_TD for trace in tape.trace(model, 1)]).double().norm())
    assert relative == pytest.approx([value / norm for value in raw], rel=1e-6)
    ids = [torch.tensor(text) for text in texts()]
    assert losses == pytest.approx([loss_without(model, ids, {1: [expert]}) for expert in range(6)], rel=1e-4)
    assert len(set(losses)) == 6


def test_the_genetic_search_finds_the_enumerated_optimum() -> None:
    """C(12, 4) = 495 sets, of which the search scores fewer than half."""
    model = qwen2_moe(num_experts=12, num_experts_per_tok=3)
    replay = LeaveOutScorer.prepare(model, recorded(model), moe_blocks.sparse_blocks(model)[1], 4, 1 << 30)
    best = best_sets(replay.errors, 12, 4, Genetic(search="exact"), 0, num_best=3)
    sets = list(itertools.combinations(range(12), 4))
    errors = replay.errors(dropped_masks(sets, 12)).tolist()
    assert best[0][0] == sets[min(range(495), key=errors.__getitem__)]
    assert [error for _, error in best] == pytest.approx(sorted(errors)[:3], rel=1e-5)
    settings = Genetic(population=32, iterations=12, parents=8, search="genetic")
    evaluated: list[int] = []

    def count_sets(dropped_PE: torch.Tensor) -> torch.Tensor:
        evaluated.append(len(dropped_PE))
        return replay.errors(dropped_PE)

    results = []
    for seed in range(10):
        evaluated.clear()
        results.append(best_sets(count_sets, 12, 4, settings, seed))
        assert sum(evaluated) < 247
    assert sum(result == best[:1] for result in results) >= 9


def test_the_same_seed_gives_the_same_sets_with_and_without_memory() -> None:
    model = qwen2_moe(num_experts=12, num_experts_per_tok=3)
    replay = LeaveOutScorer.prepare(model, recorded(model), moe_blocks.sparse_blocks(model)[1], 4, 1 << 30)
    runs = [
        best_sets(replay.errors, 12, 4, Genetic(10, 5, 4, search="genetic", memoise=memoise), 3, 5)
        for memoise in (True, True, False)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert len({experts for experts, _ in runs[0]}) == 5
    assert best_sets(replay.errors, 12, 0, Genetic(), 0) == [((), 0.0)]


@pytest.mark.parametrize(
    ("make", "block_size"),
    [
        (qwen2_moe, 2),
        (qwen2_moe, 3),
        (deepseek_v2, 3),
        (lambda: qwen2_moe(mlp_only_layers=[1], num_hidden_layers=4), 2),
    ],
)
def test_the_reception_field_is_the_best_of_all_combinations(make: Any, block_size: int) -> None:
    model = make()
    ids = texts()
    tape = Tape.record(model, blocks(ids))
    layers = list(moe_blocks.sparse_blocks(model))
    candidates = {layer: [(0, 1), (2, 4), (3, 5)] if layer % 2 else [(1,), (0, 5)] for layer in layers}
    before: dict[int, tuple[int, ...]] = {}
    runs = tape.layer_runs
    with unchanged(model):
        fields = reception_field(model, tape, candidates, block_size)
    expected_runs = 0
    for field in fields:
        expected = best_of_block(model, [torch.tensor(text) for text in ids], candidates, field.layers, before)
        assert field.choice == expected
        product = 1
        for layer in field.layers:
            product *= len(candidates[layer])
            expected_runs += product
        assert field.combinations == product and field.error > 0
        before |= {layer: candidates[layer][place] for layer, place in zip(field.layers, field.choice, strict=True)}
    assert [layer for field in fields for layer in field.layers] == layers
    if len(layers) == len(
        decoder.decoder_layers(model)
    ):  # prefixes are shared; between blocks, the chosen sets run once
        assert tape.layer_runs - runs == pytest.approx(expected_runs + len(layers) - len(fields[-1].layers))


def test_deepseek_v2_lite_on_the_meta_device() -> None:
    """The same by plan and surgery, with the config of the published model."""
    config = DeepseekV2Config(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, n_routed_experts=64, num_experts_per_tok=6,
        first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, routed_scaling_factor=1.0, topk_method="greedy", n_group=1, topk_group=1,
    )  # fmt: skip
    counts = parameters.parameter_counts(config)
    assert (counts.total, counts.routed_experts) == (15_706_484_224, 14_394_851_328)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layers = families.facts(config).moe_layers
    numbers = drop_by_importance(416, dict.fromkeys(layers, 1.0), dict.fromkeys(layers, 64), 6)
    prune = [Prune(layer, tuple(range(64 - number))) for layer, number in numbers.items()]
    shape = {layer: tuple(ranks.allocate([1.0] * (64 - number), 512, 2048, 1408)) for layer, number in numbers.items()}
    factorize = [Factorize(layer, dict.fromkeys(NAMES, layer_ranks)) for layer, layer_ranks in shape.items()]
    before = sizes(model)["routed_experts"]
    execute.restructure(model, Plan("v2-lite", (*prune, *factorize)))
    assert before == counts.routed_experts
    assert 1 - sizes(model)["routed_experts"] / before == pytest.approx(0.5398, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_stages_meet_their_budgets(family: str) -> None:
    model = FAMILIES[family]()
    step = InterExpertPruning(prune_ratio=0.34, genetic=Genetic(population=10, iterations=4, parents=4))
    assert step.check(families.facts(model.config)) == []
    cache: dict[str, Any] = {}
    with unchanged(model):
        operations, record = step.search(SearchContext(model, lambda: recorded(model), cache, 1 << 30))
        again, reread = step.search(SearchContext(model, lambda: pytest.fail("taped again"), cache, 1 << 30))
    assert operations == again and reread["reused"]
    layers = len(moe_blocks.sparse_blocks(model))
    total = round(0.34 * 6 * layers)
    assert sum(6 - len(operation.retained) for operation in operations) == total == sum(record["dropped"].values())
    important = record["layer_importance"]
    assert record["dropped"][min(important, key=important.get)] >= record["dropped"][max(important, key=important.get)]
    before = sizes(model)
    execute.execute(model, Plan("tiny", tuple(operations)))
    factors, achieved = Decompose(budget=Budget(memory_ratio=0.7)).search(
        SearchContext(model, lambda: recorded(model), {}, 1 << 30)
    )
    execute.execute(model, Plan("tiny", tuple(factors)))
    assert 0 <= int(0.7 * before["total"]) - sizes(model)["total"] < 3 * (32 + 16)
    retained = sizes(model)["routed_experts"] / before["routed_experts"]
    assert achieved["kept_of_routed_experts"] == pytest.approx(retained)


def test_lm_loss_importance_is_the_increase_of_the_loss() -> None:
    """Normalized, it is the increase over the model's loss; otherwise the loss itself, nearly equal for all experts."""
    model = qwen2_moe()
    tape, block = recorded(model), moe_blocks.sparse_blocks(model)[1]
    raw, increases = (
        expert_importance(model, tape, block, "lm_loss", normalize, 1 << 30) for normalize in (False, True)
    )
    original = loss_without(model, [torch.tensor(text) for text in texts()], {})
    assert increases == pytest.approx([max(0.0, value - original) for value in raw], abs=1e-3)
    assert max(raw) / min(raw) < 1.1 < 2 < max(increases) / max(min(increases), 1e-9)


@pytest.mark.parametrize("kind", ["layer_output", "lm_loss"])
@torch.no_grad()
def test_importance_with_as_many_experts_as_a_token_selects(kind: str) -> None:
    """Without one of two experts, the other gets all the weight."""
    for normalized in (False, True):
        model = qwen2_moe(num_experts=2, norm_topk_prob=normalized)
        tape, block = recorded(model), moe_blocks.sparse_blocks(model)[1]
        importance = expert_importance(model, tape, block, kind, False, 1 << 30)
        for expert in range(2):
            total = 0.0
            for trace in tape.trace(model, 1):
                logits_TE = block.router(trace.x_TD)[0].clone()
                logits_TE[:, expert] = -torch.inf
                weight_T = logits_TE.softmax(dim=1)[:, 1 - expert]  # 1: it is the only one
                weights = block.weights
                gate, up = (trace.x_TD @ weights.gate_up_EHD[1 - expert].T).chunk(2, dim=1)
                without_TD = weight_T[:, None] * (
                    (torch.nn.functional.silu(gate) * up) @ weights.down_EDF[1 - expert].T
                )
                original_TD = block.experts(trace.x_TD, trace.top_k_index_TK, trace.top_k_weights_TK)
                total += float((original_TD - without_TD).double().square().sum())
            assert importance[expert] == pytest.approx(total**0.5, rel=1e-3)


def test_a_router_that_selects_one() -> None:
    """top_k = 1: a layer with a single expert has no importances to compare."""
    model = qwen2_moe(num_experts=1, num_experts_per_tok=1)
    block = moe_blocks.sparse_blocks(model)[1]
    for kind in ("layer_output", "lm_loss"):
        assert expert_importance(model, recorded(model), block, kind, True, 1 << 30) == [1.0]


def test_the_search_of_a_deep_model_is_cached(tmp_path: Path) -> None:
    """94 layers, as in Qwen3-235B-A22B, with a two-digit number of dropped experts in every one."""
    model = qwen2_moe(num_hidden_layers=94, num_experts=14, hidden_size=16, moe_intermediate_size=4)
    step = InterExpertPruning(prune_ratio=12 / 14, num_candidates=1, block_size=94)
    tape = recorded(model, texts()[:1])
    first, record = step.search(SearchContext(model, lambda: tape, JsonFolder(tmp_path), 1 << 30))
    assert len(first) == 94 and {len(operation.retained) for operation in first} == {2}

    def must_not_be_called() -> Tape:
        raise AssertionError("calibrated again")

    assert step.search(SearchContext(model, must_not_be_called, JsonFolder(tmp_path), 1 << 30))[0] == first
    assert record["blocks"] == JsonFolder(tmp_path)["blocks-" + "-".join(["12"] * 94)]["blocks"]
