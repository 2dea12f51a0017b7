"""Log the learning rate, the gradient's norm, tokens per second and peak memory while a model trains."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from recondense.data.labels import MASKED
from recondense.evaluation.profiling import Clock, peak_resident_bytes
from recondense.recovery.engines import trainer as engines


class TrainingMetrics(L.Callback):
    """Log four metrics of a training, in the rows of the Trainer's own metrics (every `log_every_n_steps` steps).

    - `<stage>/learning_rate`: the largest of the optimizer's parameter groups, as used in the step;
    - `<stage>/gradient_norm`: the norm of the step's gradient over all parameters and processes, before clipping;
    - `<stage>/tokens_per_second`: of all processes, without padding, since the metrics before. Only the time in
      training steps counts, not that of validation, tasks and checkpoints;
    - `<stage>/peak_memory_bytes`: of the process that uses most. On CUDA it is the peak of allocated tensors since the
      metrics before, elsewhere the peak of resident memory since the process started.

    The stage is `pl_module.stage`, or `recovery` without one. Place this callback before those that take time.
    """

    def __init__(self) -> None:
        self._tokens: Tensor | int = 0
        self._clock: Clock | None = None  # marked before and after each batch
        self._learning_rate = 0.0
        self._norm: Tensor | None = None  # of the step that is logged next
        self._logged_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_counting(trainer)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._clock is not None:
            self._clock.mark()
        elif trainer.loggers or trainer.world_size > 1:  # only the first process may have loggers
            self._clock = Clock(pl_module.device)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._learning_rate = max(group["lr"] for group in optimizer.param_groups)
        if self._clock is not None and (trainer.global_step + 1) % _every(trainer) == 0:
            self._norm = engines.gradient_norm(trainer.strategy, optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._clock is None:
            return
        self._clock.mark()
        self._tokens += num_tokens(batch)  # on the device, without synchronizing
        if trainer.global_step == self._logged_step or trainer.global_step % _every(trainer):
            return
        norm = engines.gradient_norm_after_step(trainer.strategy) if self._norm is None else self._norm
        tokens = torch.as_tensor(self._tokens, device=pl_module.device)
        peak = torch.tensor(_take_peak(pl_module.device), device=pl_module.device)
        metrics = {
            "learning_rate": self._learning_rate,
            "gradient_norm": norm,
            "tokens_per_second": trainer.strategy.reduce(tokens, reduce_op="sum") / sum(self._clock.seconds()[::2]),
            "peak_memory_bytes": trainer.strategy.reduce(peak, reduce_op="max").double(),
        }
        stage = getattr(pl_module, "stage", "recovery")
        values = {f"{stage}/{name}": value for name, value in metrics.items() if value is not None}
        pl_module.log_dict(values, on_step=True, on_epoch=False)
        self._start_counting(trainer)

    def _start_counting(self, trainer: L.Trainer) -> None:
        self._tokens, self._clock, self._norm, self._logged_step = 0, None, None, trainer.global_step


def _every(trainer: L.Trainer) -> int:
    return max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]


def num_tokens(batch: Any) -> Tensor | int:
    """Count a batch's tokens without padding: by its mask, or up to the last label of each window."""
    if not isinstance(batch, dict) or "input_ids" not in batch:
        return 0
    if "attention_mask" in batch:
        return cast(Tensor, batch["attention_mask"].sum())
    if "labels" in batch:
        labels_BS: Tensor = batch["labels"]
        places_S = torch.arange(1, labels_BS.shape[-1] + 1, device=labels_BS.device)
        return ((labels_BS != MASKED) * places_S).amax(-1).sum()
    return int(batch["input_ids"].numel())


def _take_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return peak_resident_bytes()
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
