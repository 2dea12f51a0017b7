"""Show the progress of training: a bar with the loss on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch

from recondense.progress import ProgressBar, progress

log = logging.getLogger(__name__)


class TrainingProgress(L.Callback):
    """Show optimizer steps and what the module logs with `prog_bar=True`; for `Trainer(enable_progress_bar=False)`.

    The bar shares the display of recondense's other progress bars; Lightning's own bar would overwrite them.

    Args:
        description: what is trained, for example "recover".
        lines: approximate total number of log lines if there is no terminal.
    """

    def __init__(self, description: str = "train", lines: int = 10) -> None:
        self.description = description
        self.lines = lines
        self._stack = ExitStack()
        self._bar: ProgressBar | None = None
        self._step = 0
        self._line = 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else int(trainer.estimated_stepping_batches)
        self._line = max(1, total // self.lines)
        self._step = trainer.global_step
        if trainer.is_global_zero:
            self._bar = self._stack.enter_context(progress(self.description, total))
            self._bar.update(self._step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._bar is None or step == self._step:
            return
        self._step = step
        self._bar.update(step)
        if self._bar.shown:
            self._bar.note(_metrics(trainer))
        elif step % self._line == 0:
            log.info("%s: step %d of %d, %s", self.description, step, self._bar.total, _metrics(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._bar is not None:
            # Pass the exception on: otherwise the bar would log that the work is done.
            self._stack.__exit__(type(exception), exception, exception.__traceback__)
            self._bar = None

    def _close(self) -> None:
        self._stack.close()
        self._bar = None


def _metrics(trainer: L.Trainer) -> str:
    shown = []
    for name, value in trainer.progress_bar_metrics.items():
        number = value.item() if isinstance(value, torch.Tensor) else value
        if isinstance(number, (int, float)) and name != "v_num":
            shown.append(f"{name.rsplit('/', 1)[-1]} {number:.4g}")
    return ", ".join(shown)
