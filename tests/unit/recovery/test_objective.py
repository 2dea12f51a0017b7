"""The objective: how the shares of its losses change from the first step of a training to the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from support.recoveries import QUIET, data, prepared
from support.tiny_models import condense_plan, qwen2_moe

from recondense.config.schema import RecoveryConfig
from recondense.recovery.fit import fit
from recondense.recovery.objective import Shares, shares_at


def test_constant_shares_are_the_settings_to_the_bit() -> None:
    settings = RecoveryConfig(objective="distill", steps=7, cross_entropy_share=0.1, hidden_share=0.3)
    assert {shares_at(settings, step) for step in range(7)} == {Shares(0.1, 0.3)}


def test_a_pair_goes_linearly_from_the_first_step_to_the_last() -> None:
    settings = RecoveryConfig(objective="distill", steps=5, cross_entropy_share=(0.0, 0.4), hidden_share=(0.5, 0.1))
    shares = [value for step in range(5) for value in shares_at(settings, step)]
    assert shares == pytest.approx([0.0, 0.5, 0.1, 0.4, 0.2, 0.3, 0.3, 0.2, 0.4, 0.1])
    assert shares_at(RecoveryConfig(steps=1, cross_entropy_share=(0.25, 1.0)), 0) == Shares(0.25, 0.0)


class Losses(L.Callback):
    """Keeps the losses of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        names = ("loss", "kl", "cross_entropy", "hidden")
        self.steps.append({name: float(trainer.callback_metrics[f"recovery/{name}"]) for name in names})


def test_a_training_weighs_each_step_by_its_shares(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"cross_entropy_share": (0.0, 0.5), "hidden_share": (0.4, 0.2), "steps": 3}
    module = prepared(qwen2_moe(), condense_plan(qwen2_moe(), [1, 2]), **changes)
    losses = Losses()
    fit(module, data(module), tmp_path, QUIET, seed=0, callbacks=[losses])
    for step, (entropy, hidden) in zip(losses.steps, [(0.0, 0.4), (0.25, 0.3), (0.5, 0.2)], strict=True):
        parts = (1 - entropy - hidden) * step["kl"] + entropy * step["cross_entropy"] + hidden * step["hidden"]
        assert step["loss"] == pytest.approx(parts, rel=1e-5)
