"""Difficult cases of scoring sets of dropped experts: steep routers, little memory, overflow, half precision."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.brute_force_moei2 import change, loss_without
from support.tiny_models import FAMILIES, qwen2_moe, recorded, texts

from recondense.methods.search.genetic import Genetic, best_sets
from recondense.methods.search.importance import expert_importance
from recondense.methods.search.leave_out import LeaveOutScorer
from recondense.models import moe_blocks

MODELS: dict[str, Any] = {**FAMILIES, "normalized": lambda: qwen2_moe(norm_topk_prob=True)}
SETS = [experts for number in range(1, 5) for experts in itertools.combinations(range(6), number)]
DROPPED = torch.tensor([[expert in experts for expert in range(6)] for experts in SETS])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scale", [10, 30, 100])
@torch.no_grad()
def test_errors_under_a_steep_router(name: str, scale: float) -> None:
    """Without the first experts, the logits of the others are too small for fp32 exponentials relative to the first."""
    model = MODELS[name]()
    block: Any = moe_blocks.sparse_blocks(model)[2]
    block.router.weight.mul_(scale)
    tape = recorded(model)
    logits_TE = torch.cat([block.router(trace.x_TD)[0] for trace in tape.trace(model, 2)]).float()
    assert scale == 10 or (logits_TE.amax(1) - logits_TE.amin(1)).max() > 110
    errors = LeaveOutScorer.prepare(model, tape, block, 4, 1 << 30).errors(DROPPED).tolist()
    for experts, error in zip(SETS, errors, strict=True):
        assert error == pytest.approx(change(model, tape, 2, experts), rel=1e-3, abs=1e-4), experts


@pytest.mark.parametrize("scale", [1, 30])
@torch.no_grad()
def test_errors_depend_neither_on_memory_nor_on_other_sets(scale: float) -> None:
    model: Any = qwen2_moe()
    block: Any = moe_blocks.sparse_blocks(model)[1]
    block.router.weight.mul_(scale)
    tape = recorded(model)
    expected = LeaveOutScorer.prepare(model, tape, block, 4, 1 << 30).errors(DROPPED)
    for scratch in (1, 1 << 12, 1 << 16, 1 << 20):
        assert torch.allclose(
            LeaveOutScorer.prepare(model, tape, block, 4, scratch).errors(DROPPED), expected, rtol=1e-6, atol=0
        )
    replay = LeaveOutScorer.prepare(model, tape, block, 4, 1 << 30)
    alone = torch.cat([replay.errors(row) for row in DROPPED.split(1)])
    assert torch.allclose(alone, expected, rtol=1e-6, atol=0)


@torch.no_grad()
def test_an_overflow_is_an_error_that_names_the_layer() -> None:
    """Even of an expert that no token selects until others are dropped: the calibration run would not see it."""
    model: Any = qwen2_moe()
    block: Any = moe_blocks.sparse_blocks(model)[2]
    tape = recorded(model)
    block.experts.down_proj[5] = torch.inf
    with pytest.raises(ValueError, match="layer 2"):
        LeaveOutScorer.prepare(model, tape, block, 4, 1 << 30).errors(DROPPED)


@torch.no_grad()
def test_half_precision_follows_the_block_within_its_rounding() -> None:
    """The block rounds weights and sums to bfloat16; the scores do not."""
    model: Any = qwen2_moe().to(torch.bfloat16)
    tape, block = recorded(model), moe_blocks.sparse_blocks(model)[2]
    errors = LeaveOutScorer.prepare(model, tape, block, 4, 1 << 30).errors(DROPPED).tolist()
    largest = [(experts, error) for experts, error in zip(SETS, errors, strict=True) if len(experts) == 4]
    for experts, error in largest:
        assert error == pytest.approx(change(model, tape, 2, experts), rel=0.05), experts


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("memoise", [False, True])
def test_the_search_is_the_same_with_errors_of_the_block(name: str, memoise: bool) -> None:
    """Every generation and the result: replay takes the place of a run of the block for every set."""
    model = MODELS[name]()
    tape, block = recorded(model), moe_blocks.sparse_blocks(model)[2]
    replay = LeaveOutScorer.prepare(model, tape, block, 3, 1 << 30)

    def by_the_block(dropped_PE: torch.Tensor) -> torch.Tensor:
        sets = [row.nonzero().flatten().tolist() for row in dropped_PE]
        return torch.tensor([change(model, tape, 2, experts) for experts in sets], dtype=torch.float64)

    runs = []
    for errors in (replay.errors, by_the_block):
        seen: list[list[list[bool]]] = []

        def record_sets(dropped_PE: torch.Tensor, errors: Any = errors, seen: Any = seen) -> torch.Tensor:
            seen.append(dropped_PE.tolist())
            return errors(dropped_PE)

        settings = Genetic(population=6, iterations=3, parents=3, search="genetic", memoise=memoise)
        runs.append((best_sets(record_sets, 6, 3, settings, seed=1, num_best=3), seen))
    (replayed, replayed_sets), (rerun, rerun_sets) = runs
    assert replayed_sets == rerun_sets and [experts for experts, _ in replayed] == [experts for experts, _ in rerun]
    assert [error for _, error in replayed] == pytest.approx([error for _, error in rerun], rel=1e-4)


def test_dropping_too_many_experts_is_refused() -> None:
    model = qwen2_moe()
    tape, block = recorded(model), moe_blocks.sparse_blocks(model)[0]
    with pytest.raises(ValueError, match="layer 0: dropping 5 of 6"):
        LeaveOutScorer.prepare(model, tape, block, 5, 1 << 30)


def test_lm_loss_in_little_memory() -> None:
    """With the logits of a few tokens at a time, the loss is the same."""
    model = qwen2_moe()
    tape, block = recorded(model), moe_blocks.sparse_blocks(model)[2]
    little = expert_importance(model, tape, block, "lm_loss", False, 1 << 12)
    ids = [torch.tensor(text) for text in texts()]
    assert little == pytest.approx([loss_without(model, ids, {2: [expert]}) for expert in range(6)], rel=1e-5)
    assert little == pytest.approx(expert_importance(model, tape, block, "lm_loss", False, 1 << 30), rel=1e-6)
