"""Every way of computing low-rank experts, against transformers' experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.plain_moe import (
    ROUTING,
    PlainMoE,
    Ranks,
    block_of,
    tokens,
)
from support.tiny_models import EVERY

from recondense.models import low_rank, moe_blocks
from recondense.models.low_rank import LowRankExperts
from recondense.operations import Factorize
from recondense.plan import Plan
from recondense.surgery import execute

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


NAMES = ("gate_proj", "up_proj", "down_proj")
ALIKE: Ranks = dict.fromkeys(NAMES, (4,) * 6)
# Ranks, number of tokens, and the function of low_rank.py that computes them on a CPU.
WAYS: dict[str, tuple[Ranks, int, str]] = {
    "one bucket, one token": (ALIKE, 1, "_row_by_row"),
    "several buckets, one token": (dict.fromkeys(NAMES, (4, 4, 3, 5, 5, 7)), 1, "_row_by_row"),
    "one bucket": (ALIKE, 23, "_padded"),
    "odd ranks, one bucket": (dict.fromkeys(NAMES, (3,) * 6), 23, "_padded"),
    "two buckets of three": (dict.fromkeys(NAMES, (4, 8, 4, 8, 4, 8)), 23, "grouped_linear"),
    "down whole": ({**ALIKE, "down_proj": (None,) * 6}, 23, "grouped_linear"),
    "odd ranks, two buckets of three": (dict.fromkeys(NAMES, (3, 5, 3, 5, 3, 5)), 23, ""),
    "gate whole, odd ranks": ({"gate_proj": (None,) * 6, "up_proj": (3,) * 6, "down_proj": (5,) * 6}, 23, ""),
    "one expert a bucket": (dict.fromkeys(NAMES, (1, 2, 3, 4, 5, 6)), 23, ""),
}


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("name", WAYS)
def test_every_way_of_computing_low_rank_experts(name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients are those of transformers' experts with the products as weights."""
    ranks, number, way = WAYS[name]
    taken: set[str] = set()
    for owner, attribute in (
        (LowRankExperts, "_row_by_row"),
        (low_rank._Bucket, "_padded"),
        (low_rank, "grouped_linear"),
    ):
        function = getattr(owner, attribute)
        monkeypatch.setattr(
            owner,
            attribute,
            lambda *a, function=function, attribute=attribute, **k: (taken.add(attribute), function(*a, **k))[1],
        )
    model = EVERY[family]()
    dense = copy.deepcopy(block_of(model, 1))
    dense.load_state_dict(PlainMoE(dense, ROUTING[family]).truncated(ranks).state)
    execute.execute(model, Plan("tiny", (Factorize(1, ranks),)))
    block = block_of(model, 1)
    results = []
    for moe in (block, dense):
        moe.experts.requires_grad_(True)
        x_TD = tokens(2.0, number).requires_grad_(True)
        output = moe_blocks.block_output(moe(x_TD[None]))[0]
        (output * torch.linspace(-1, 1, 32)).sum().backward()
        results.append((output.detach(), x_TD.grad))
    assert taken == ({way} if way else set())
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)
    if family == "gpt_oss":
        _same_bias_gradients(block.experts, dense.experts)


def _same_bias_gradients(low_rank_experts: LowRankExperts, dense_experts: Any) -> None:
    for expert in range(6):
        bucket, position = low_rank_experts.place_of(expert)
        both, down = dense_experts.gate_up_proj_bias.grad[expert], dense_experts.down_proj_bias.grad[expert]
        for bias, grad in zip(bucket.biases() or (), (both[::2], both[1::2], down), strict=True):
            gradient = torch.zeros_like(bias) if bias.grad is None else bias.grad  # no token selects its bucket
            torch.testing.assert_close(gradient[position], grad, **CLOSE)
