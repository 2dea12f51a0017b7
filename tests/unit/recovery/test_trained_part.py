"""The trained part of a student: constants of condensed layers that are folded before the training."""

from __future__ import annotations

import torch
from support.recoveries import prepared
from support.tiny_models import condense_plan, logits, qwen2_moe, windows
from torch import Tensor

from recondense.models import moe_blocks
from recondense.models.replacement_blocks import CondensedMoE
from recondense.recovery.module import RecoveryModule

RATE = 1e-3
IDS = windows(2, 8)


def condensed(module: RecoveryModule) -> CondensedMoE:
    block = moe_blocks.get_block(module.model, 1)
    assert isinstance(block, CondensedMoE)
    return block


def effective(block: CondensedMoE) -> Tensor:
    """The weights that the layer computes with."""
    weight = block.down_proj.weight.detach()
    return weight if block.scale is None else weight * block.scale


def test_only_layers_whose_experts_train_are_folded() -> None:
    for trainable, folded in (("experts", True), ("all", True), ("norms", False)):
        model = qwen2_moe()
        module = prepared(model, condense_plan(model, [1]), fold_coefficients=True, trainable=trainable)
        assert (condensed(module).scale is None) == folded, trainable


def test_folding_changes_no_output_and_makes_a_step_as_large_as_the_rate() -> None:
    """AdamW's first step is the rate in every weight, so constant times weight moves by constant times rate."""
    moved: dict[bool, Tensor] = {}
    expected = None
    for fold in (False, True):
        model = qwen2_moe()
        module = prepared(model, condense_plan(model, [1]), fold_coefficients=fold)
        block = condensed(module)
        assert (block.scale is None) == fold
        expected = logits(model, IDS) if expected is None else expected
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-5, atol=1e-6)
        before = effective(block).clone()
        optimizer = torch.optim.AdamW([block.down_proj.weight], lr=RATE, weight_decay=0.0, eps=1e-30)
        torch.manual_seed(0)
        block(torch.randn(16, block.down_proj.out_features)).square().sum().backward()
        optimizer.step()
        moved[fold] = (effective(block) - before).abs()
        with module.student.original() as original:
            torch.testing.assert_close(logits(original, IDS), logits(qwen2_moe(), IDS), rtol=0, atol=0)
    scale = condensed(prepared(model := qwen2_moe(), condense_plan(model, [1]))).scale
    assert scale is not None and float(scale.min()) < 0.9
    torch.testing.assert_close(moved[True], torch.full_like(moved[True], RATE), rtol=1e-2, atol=0)
    torch.testing.assert_close(moved[False], scale.expand_as(moved[False]) * RATE, rtol=1e-2, atol=0)
