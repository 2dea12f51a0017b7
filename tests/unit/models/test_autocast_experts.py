"""Experts in bf16 with weights in fp32: grouped products against transformers' experts one after another."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import EVERY, windows
from torch import Tensor

from recondense.models import moe_blocks
from recondense.models.autocast_experts import NAME, autocast_experts


@pytest.mark.parametrize("family", EVERY)
def test_grouped_experts_under_autocast_round_as_single_ones_do(family: str) -> None:
    model = EVERY[family]()
    block = next(iter(moe_blocks.sparse_blocks(model).values()))
    torch.manual_seed(0)
    x_TD = torch.randn(40, model.config.hidden_size, requires_grad=True)
    index_TK = torch.rand(40, block.num_experts).topk(2).indices
    weight_TK = torch.rand(40, 2, requires_grad=True)
    trained = [x_TD, weight_TK, *block.experts.parameters()]

    def outputs(experts: str, inside: str = "") -> list[Tensor]:
        """The output, and the gradients of all inputs and weights."""
        model.set_experts_implementation(experts)
        with autocast_experts(model, bool(inside)), torch.autocast("cpu", torch.bfloat16, enabled=bool(inside)):
            assert not inside or model.get_experts_implementation() == {"": inside}
            y_TD = block.experts(x_TD, index_TK, weight_TK)
        assert model.get_experts_implementation() == {"": experts}
        assert y_TD.dtype == torch.float32
        return [y_TD.detach(), *torch.autograd.grad((y_TD**2).sum(), trained)]

    exact, single = outputs("eager"), outputs("eager", "eager")
    for expected, other, value in zip(exact, single, outputs("grouped_mm", NAME), strict=True):
        assert value.dtype == torch.float32
        assert 0 < (value - expected).norm() < 0.02 * expected.norm()
        assert (value - expected).norm() < 3 * (other - expected).norm()


@pytest.mark.parametrize("enabled", [True, False])
def test_without_autocast_the_experts_are_transformers_own(enabled: bool) -> None:
    model, ids = EVERY["qwen2_moe"](), windows(2, 16)
    expected = model(ids).logits
    with autocast_experts(model, enabled):
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
