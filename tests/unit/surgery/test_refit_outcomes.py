"""Refits that would make a layer worse, and refits in parts."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny_models import bits, qwen2_moe, recorded, same_bits

from recondense.models import moe_blocks
from recondense.operations import Condense, Operation, Prune, Refit
from recondense.plan import Plan
from recondense.surgery import execute, least_squares
from recondense.surgery import refit as refit_module

FOUR = (0, 2, 3, 5)


def change_and_refit(model: Any, operation: Operation, refit: Refit) -> tuple[Any, dict[str, float]]:
    """Change and refit layer 1; return its weights before the refit, and the refit's report."""
    originals = execute.execute(model, Plan("tiny", (operation,)))
    before = bits(moe_blocks.get_block(model, 1))
    report = execute.refit(model, Plan("tiny", (refit,)), originals, lambda: recorded(model))
    return before, report[1]


@pytest.mark.parametrize(
    ("operation", "what", "solver"),
    [
        (Prune(1, FOUR), "down_proj", "solve"),
        (Condense(1, (3, 0), (0.4, 0.2), 0.5), "down_proj", "solve"),
        (Condense(1, (3, 0), (0.4, 0.2), 0.5), "coefficients", "_solve_coefficients"),
    ],
)
def test_a_refit_that_makes_a_layer_worse_is_undone(
    monkeypatch: pytest.MonkeyPatch, operation: Operation, what: Any, solver: str
) -> None:
    worse: list[bool] = []

    def ten_times(block: Any, *args: Any) -> None:
        before = bits(block)
        for weight in [unit.weight_Dn for unit in args[0]] if solver == "solve" else [block.scale]:
            weight *= 10
        worse.append(not same_bits(bits(block), before))

    monkeypatch.setattr(refit_module, solver, ten_times)
    model = qwen2_moe()
    before, report = change_and_refit(model, operation, Refit(1, what, 1e-3))
    assert worse == [True]
    assert same_bits(bits(moe_blocks.get_block(model, 1)), before)
    assert report["error_after"] == report["error_before"] > 0


def test_parts_are_solved_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one expert at a time, several sweeps get nearer to the target than one."""
    refit = Refit(1, "down_proj", 1e-3)
    monkeypatch.setattr(refit_module, "most_columns", lambda original: 17)
    _, several = change_and_refit(qwen2_moe(), Prune(1, FOUR), refit)
    monkeypatch.setattr(least_squares, "SWEEPS", 1)
    _, once = change_and_refit(qwen2_moe(), Prune(1, FOUR), refit)
    assert several["error_before"] == once["error_before"]
    assert several["error_after"] < 0.75 * once["error_after"] < once["error_before"]
