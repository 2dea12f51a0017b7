"""An optimiser step is one mean over its tokens, however many batches it has and however many tokens they predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from support import small_trainer
from support.recoveries import QUIET, prepared
from support.tiny_models import condense_plan, qwen2_moe, windows
from torch import Tensor

from recondense.callbacks.training_metrics import TrainingMetrics
from recondense.data.labels import MASKED, target_mask
from recondense.data.loader import RecoveryData
from recondense.recovery.fit import fit
from recondense.recovery.module import RecoveryModule

TARGETS = (1, 7, 7, 1, 3, 2, 7, 5)
SHARES: dict[str, Any] = {"cross_entropy_share": 0.25, "temperature": 2.0}


def table(targets: tuple[int, ...] = TARGETS) -> dict[str, Tensor]:
    """Windows of 8 tokens, in which the last `targets` tokens are to be predicted."""
    ids = windows(len(targets), 8)
    counted = torch.arange(8) >= 8 - torch.tensor(targets)[:, None]
    return {"input_ids": ids, "labels": torch.where(counted, ids, MASKED)}


class Recorder(L.Callback):
    """Records the gradients of the only step, and its logged metrics."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.logged: dict[str, float] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.gradients = {name: value.grad.clone() for name, value in trained.items()}

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}


def module_of(**changes: Any) -> RecoveryModule:
    return prepared(qwen2_moe(), condense_plan(qwen2_moe(), [1, 2]), steps=1, **changes)


def step(folder: Path, batch_size: int, accumulate: int, validate: int = 0, **changes: Any) -> Recorder:
    """One optimiser step on all eight windows."""
    module = module_of(
        batch_size=batch_size, accumulate_grad_batches=accumulate, validate_every=validate, **changes
    )  # fmt: skip
    data = RecoveryData(table(), table(TARGETS[::-1]) if validate else None, batch_size, accumulate, seed=3)
    recorder = Recorder()
    fit(module, data, folder / f"{batch_size}x{accumulate}", QUIET, seed=0, callbacks=[recorder])
    return recorder


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and sum(float(value.abs().max()) for value in expected.values()) > 0
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=5e-7)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "finetune"},
        {"objective": "finetune", "trainable": "lora"},
        SHARES,
        {**SHARES, "divergence": "reverse_kl"},
    ],
    ids=["finetune", "lora", "distill", "reverse"],
)
def test_small_batches_equal_one_large_batch(tmp_path: Path, changes: dict[str, Any]) -> None:
    large = step(tmp_path, 8, 1, **changes)
    for batch_size, accumulate in ((4, 2), (2, 4), (1, 8)):
        small = step(tmp_path, batch_size, accumulate, **changes)
        same(small.gradients, large.gradients)
        assert small.logged == pytest.approx(large.logged, rel=1e-5)


def test_hidden_states_of_a_batch_weigh_by_its_tokens(tmp_path: Path) -> None:
    """They are relative to the teacher's in the same batch; a batch counts by the tokens that it predicts."""
    changes: dict[str, Any] = {**SHARES, "hidden_share": 0.25}
    parts = step(tmp_path, 2, 4, **changes)
    module = module_of(**changes)
    module.train()
    data = RecoveryData(table(), None, 2, 4, seed=3)
    total = 0.0
    for batch in data.train_dataloader():
        losses = module.losses(**batch)
        share = float(target_mask(batch["labels"]).sum()) / sum(TARGETS)
        (share * losses["loss"]).backward()
        total += share * losses["hidden"].item()
    same(
        parts.gradients,
        {name: value.grad for name, value in module.named_parameters() if value.grad is not None},
    )
    assert parts.logged["recovery/hidden"] == pytest.approx(total, rel=1e-5)


def test_validation_is_one_mean_over_tokens(tmp_path: Path) -> None:
    steps = [step(tmp_path, batch_size, 8 // batch_size, validate=1) for batch_size in (1, 2, 8)]
    for name in ("recovery/validation_loss", "recovery/validation_kl"):
        assert [recorder.logged[name] for recorder in steps] == pytest.approx([steps[0].logged[name]] * 3, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logged_rows_count_the_optimizer_steps_done(accumulate: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 4, "batch_size": 2, "accumulate_grad_batches": accumulate}
    module = prepared(qwen2_moe(), condense_plan(qwen2_moe(), [1, 2]), validate_every=2, **settings)
    data, logger = RecoveryData(table(), table(), 2, 4 * accumulate, seed=3), small_trainer.Recorder()
    fit(module, data, tmp_path, QUIET, seed=0, callbacks=[TrainingMetrics()], loggers=[logger])
    steps = [logger.steps(f"recovery/{name}") for name in ("validation_loss", "loss", "gradient_norm")]
    assert steps == [[2, 4], [4], [4]], "the training is logged at its last step"
