"""Learning rate, gradient norm, tokens per second and peak memory: the right figures, at the right steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from support.small_trainer import Module, Recorder, fit
from torch.utils.data import DataLoader

from recondense.callbacks import training_metrics
from recondense.callbacks.lm_eval import LmEval
from recondense.callbacks.training_metrics import TrainingMetrics
from recondense.evaluation import lm_eval, profiling

NAMES = ("learning_rate", "gradient_norm", "tokens_per_second", "peak_memory_bytes")


class Watched(Module):
    """Keeps the norm of each step's gradient, computed after it was clipped, and halves its learning rate."""

    def __init__(self, stage: str | None = None) -> None:
        super().__init__()
        if stage is not None:
            self.stage = stage
        self.norms: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        squares = [float(p.grad.double().square().sum()) for p in self.parameters() if p.grad is not None]
        self.norms.append(sum(squares) ** 0.5)


def logged(recorder: Recorder, name: str) -> dict[int | None, float]:
    return {step: float(metrics[name]) for step, metrics in recorder.metrics if name in metrics}


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_four_metrics_are_in_the_rows_of_the_loss(clip: float | None, tmp_path: Path) -> None:
    module = Watched("sft")
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "log_every_n_steps": 2, "gradient_clip_val": clip}
    _, recorder = fit(module, [TrainingMetrics()], tmp_path, num_batches=12, **settings)
    rows = {step: metrics for step, metrics in recorder.metrics if "recovery/loss" in metrics}
    assert list(rows) == [1, 3, 5], "the second, fourth and sixth step"
    for step, metrics in rows.items():
        assert {f"sft/{name}" for name in NAMES} <= set(metrics), step
    assert logged(recorder, "sft/learning_rate") == pytest.approx({1: 0.05, 3: 0.0125, 5: 0.003125})
    assert logged(recorder, "sft/gradient_norm") == pytest.approx(dict(zip((1, 3, 5), module.norms[1::2], strict=True)))
    assert all(1e8 < value < 1e11 for value in logged(recorder, "sft/peak_memory_bytes").values())


@pytest.mark.parametrize(("more", "tokens"), [("nothing", 16), ("labels", 12), ("mask", 11)])
def test_tokens_are_counted_without_filler(
    more: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With labels, up to the last target; with a mask, what it marks; otherwise all. Summed over processes."""
    ticks = iter(range(1000))
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(ticks)))
    labels = torch.full((2, 8), -100)
    labels[0, 2], labels[0, 4], labels[1, 6] = 2, 4, 14
    mask = (torch.arange(8) < torch.tensor([[3], [8]])).long()
    batch = {"input_ids": torch.arange(16).view(2, 8)}
    batch |= {"nothing": {}, "labels": {"labels": labels}, "mask": {"labels": labels, "attention_mask": mask}}[more]
    reduced: list[str] = []

    def reduce(self: Any, value: torch.Tensor, reduce_op: str) -> torch.Tensor:
        reduced.append(reduce_op)
        return 3 * value if reduce_op == "sum" else value + 5

    monkeypatch.setattr(L.pytorch.strategies.SingleDeviceStrategy, "reduce", reduce)
    monkeypatch.setattr(training_metrics, "peak_resident_bytes", lambda: 100)
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=recorder, default_root_dir=tmp_path, callbacks=[TrainingMetrics()],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        accumulate_grad_batches=2, log_every_n_steps=2,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader([batch] * 8, batch_size=None))  # type: ignore[arg-type]
    # Two logs of two steps of two batches; this clock counts a second for each; three processes.
    assert logged(recorder, "recovery/tokens_per_second") == {1: 3 * tokens, 3: 3 * tokens}
    assert logged(recorder, "recovery/peak_memory_bytes") == {1: 105, 3: 105}, "of the largest process"
    assert reduced.count("max") == 2


def test_an_evaluation_does_not_count_as_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def run_tasks(*_: Any, **__: Any) -> dict[str, Any]:
        now[0] += 1000.0
        return {}

    def tick() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(profiling.time, "perf_counter", tick)
    monkeypatch.setattr(lm_eval, "run_tasks", run_tasks)
    _, recorder = fit(Module(), [TrainingMetrics(), LmEval(["a"], every_n_steps=1)], tmp_path)
    assert set(logged(recorder, "recovery/tokens_per_second").values()) == {16.0}


def test_training_is_not_affected(tmp_path: Path) -> None:
    plain, measured = Watched(), Watched()
    fit(plain, [], tmp_path, gradient_clip_val=1e-2)
    fit(measured, [TrainingMetrics()], tmp_path, gradient_clip_val=1e-2)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, measured.state_dict()[name]), name


def test_without_a_logger_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_metrics, "Clock", None)
    fit(Module(), [TrainingMetrics()], tmp_path, logger=False)
