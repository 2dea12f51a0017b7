"""Ranks follow importances, and whitening lowers the error on calibration tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from support.step_search import search
from support.tiny_models import FAMILIES, qwen2_moe, recorded

from recondense.methods import decompose
from recondense.methods.decompose import Decompose
from recondense.methods.search.budget import Budget
from recondense.models import moe_blocks
from recondense.operations import Factorize
from recondense.plan import Plan
from recondense.surgery import execute

NAMES = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    "how", [{"average_rank": 6}, {"ratio": 0.5625}, {"budget": Budget(removed_expert_ratio=0.4375)}], ids=str
)
def test_ranks_follow_importances(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    """R_j = I_j^α / Σ I^α · R_a · M': roots 1, 2 and 1.5 of 9 give 4, 8 and 6 of 6 · 6. A rank keeps 144 of 1536."""
    by_layer = {0: [1.0, 4.0, 2.25] * 2, 1: [4.0, 4.0, 1.0, 1.0, 2.25, 2.25], 2: [7.0] * 6}
    monkeypatch.setattr(decompose, "expert_importances", lambda *_: by_layer)
    operations, _ = search(Decompose(alpha=0.5, **how), qwen2_moe())
    expected = {0: (4, 8, 6, 4, 8, 6), 1: (8, 8, 4, 4, 6, 6), 2: (6,) * 6}
    assert {operation.layer: dict(operation.ranks) for operation in operations} == {
        layer: dict.fromkeys(NAMES, ranks) for layer, ranks in expected.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_whitened_factors_lose_less_on_the_calibration_tokens(family: str) -> None:
    errors = {}
    for whitening in (False, True):
        model = FAMILIES[family]()
        tape = recorded(model)
        plan = Plan("tiny", (Factorize(1, dict.fromkeys(NAMES, (6,) * 6), whitening),))
        execute.execute(model, plan, partial(recorded, model))
        block: Any = moe_blocks.get_block(model, 1)
        outputs = [(block(trace.x_TD[None])[0], trace.output_TD) for trace in tape.trace(model, 1)]
        errors[whitening] = (
            sum(float((output - original).double().square().sum()) for output, original in outputs) ** 0.5
        )
    assert 0 < errors[True] < 0.8 * errors[False]
