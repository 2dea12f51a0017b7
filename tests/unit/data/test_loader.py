"""The order of training windows, also after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from recondense.data.loader import RecoveryData, Windows


def order(num_windows: int = 10, batch_size: int = 3, num_batches: int = 8, seed: int = 0) -> list[list[int]]:
    windows = torch.arange(num_windows)[:, None]
    loader = RecoveryData(windows, None, batch_size, num_batches, seed).train_dataloader()
    return [batch["input_ids"].flatten().tolist() for batch in loader]


def test_a_batch_may_hold_the_end_of_an_epoch_and_the_start_of_the_next() -> None:
    batches = order()
    assert [len(batch) for batch in batches] == [3] * 8
    flat = [index for batch in batches for index in batch]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)) and flat[:10] != flat[10:20]
    assert order() == batches and order(seed=1) != batches


def test_fewer_windows_than_a_batch() -> None:
    assert [sorted(batch) for batch in order(num_windows=2, batch_size=4, num_batches=2)] == [[0, 0, 1, 1]] * 2


def test_a_position_is_enough_to_resume() -> None:
    data = RecoveryData(torch.arange(10)[:, None], None, 3, 8, 0)
    first, second = data.train_dataloader(), data.train_dataloader()
    batches = iter(first)
    for _ in range(5):
        next(batches)
    assert first.state_dict() == {"position": 5}
    second.load_state_dict(first.state_dict())
    assert len(second) == 8
    assert [b["input_ids"].tolist() for b in second] == [b["input_ids"].tolist() for b in batches]


def test_all_validation_windows_come_in_order() -> None:
    windows = Windows(torch.arange(10).view(5, 2), 2)
    assert len(windows) == 3
    assert torch.cat([batch["input_ids"] for batch in windows]).flatten().tolist() == list(range(10))


def test_no_training_window_is_refused() -> None:
    with pytest.raises(ValueError, match="no training window"):
        RecoveryData(torch.empty(0, 4, dtype=torch.long), None, 1, 1, 0)


class Recorder(lightning.LightningModule):
    """Records the batches that it sees; its weight depends on all of them and on their order."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.interrupt_at = interrupt_at
        self.seen: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        if batch_index == self.interrupt_at:
            raise KeyboardInterrupt
        self.seen.append(batch["input_ids"][:, 0].tolist())
        return (self.weight - batch["input_ids"].float().mean()) ** 2

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.validated += batch["input_ids"][:, 0].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Save(Callback):
    """Saves a checkpoint after a step, or when a step is interrupted."""

    def __init__(self, path: Path, step: int | None = None) -> None:
        self.path = path
        self.step = step

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_exception(self, trainer: lightning.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def fit(
    folder: Path,
    module: Recorder,
    *,
    save: Save | None = None,
    max_steps: int | None = None,
    resume: Path | None = None,
    accumulate: int = 1,
    validate: bool = False,
) -> lightning.Trainer:
    windows = torch.arange(7)[:, None].expand(7, 4).contiguous()
    validation = windows[:3] if validate else None
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=max_steps or 12 // accumulate,
        default_root_dir=folder,
        accumulate_grad_batches=accumulate,
        callbacks=[] if save is None else [save],
        enable_checkpointing=False,
        val_check_interval=4 if validate else None,
        limit_val_batches=None if validate else 0,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, datamodule=RecoveryData(windows, validation, 2, 12, seed=3), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_stopped_run_resumes_with_the_next_batch(tmp_path: Path, steps: int, accumulate: int) -> None:
    uninterrupted, before, after = Recorder(), Recorder(), Recorder()
    fit(tmp_path, uninterrupted, accumulate=accumulate)
    checkpoint = tmp_path / "stopped.ckpt"
    fit(tmp_path, before, max_steps=steps, accumulate=accumulate).save_checkpoint(checkpoint)
    fit(tmp_path, after, resume=checkpoint, accumulate=accumulate)
    assert len(uninterrupted.seen) == 12 and len(before.seen) == steps * accumulate
    assert before.seen + after.seen == uninterrupted.seen
    assert torch.equal(after.weight, uninterrupted.weight)


def test_a_run_killed_between_checkpoints_resumes_from_the_last_one(tmp_path: Path) -> None:
    uninterrupted, after = Recorder(), Recorder()
    fit(tmp_path, uninterrupted, validate=True)
    checkpoint = tmp_path / "step.ckpt"
    fit(tmp_path, Recorder(), save=Save(checkpoint, step=5), max_steps=7, validate=True)
    fit(tmp_path, after, resume=checkpoint, validate=True)
    assert after.seen == uninterrupted.seen[5:] and torch.equal(after.weight, uninterrupted.weight)
    assert uninterrupted.validated == [0, 1, 2] * 3 and after.validated == [0, 1, 2] * 2


def test_a_step_that_was_interrupted_is_repeated(tmp_path: Path) -> None:
    uninterrupted, before, after = Recorder(), Recorder(interrupt_at=5), Recorder()
    fit(tmp_path, uninterrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, before, save=Save(tmp_path / "interrupted.ckpt"))
    fit(tmp_path, after, resume=tmp_path / "interrupted.ckpt")
    assert before.seen + after.seen == uninterrupted.seen
    assert torch.equal(after.weight, uninterrupted.weight)


def test_the_state_is_plain_numbers(tmp_path: Path) -> None:
    checkpoint = tmp_path / "stopped.ckpt"
    fit(tmp_path, Recorder(), max_steps=4).save_checkpoint(checkpoint)
    state = torch.load(checkpoint, weights_only=True)
    assert state["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"position": 4}]
