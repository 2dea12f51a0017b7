"""Stop at the end of an optimiser step when asked to, with a checkpoint of that step."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

log = logging.getLogger(__name__)


class Stopped(SIGTERMException):
    """Raised to end the process: a SystemExit whose code is 128 + the signal (143 for SIGTERM, 130 for Ctrl-C)."""


class GracefulStop(L.Callback):
    """On SIGTERM or Ctrl-C: finish the optimiser step, save a checkpoint, leave with code 143 or 130.

    Lightning itself saves nothing on SIGTERM, raises in the middle of gradient accumulation too, and exits with code 0;
    on Ctrl-C it stops in the middle of a step. While training, this callback's handler replaces it. The
    checkpoint is written by the Trainer's ModelCheckpoint, under the same name as the periodic ones, so resuming finds
    it like any other. A second signal ends the process at once. With several processes it is enough that one gets the
    signal. Let it be the last callback in the list: what the others do at that step then belongs to the checkpoint.

    Args:
        signals: names of the signals to follow.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGINT")) -> None:
        self.signals = tuple(signal.Signals[name] for name in signals)
        self._before: dict[signal.Signals, Any] = {}
        self._received: signal.Signals | None = None
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._received = None
        # Here, not earlier: the Trainer puts its own handlers in place after `on_fit_start`.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.signals}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:  # else gradients are still being accumulated
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_asked(trainer)  # the signal came after the last step, in an evaluation perhaps
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    def _note(self, number: int, frame: Any) -> None:
        if self._received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        self._received = signal.Signals(number)
        print(f"\n{self._received.name}: finishing this step; once more ends at once", file=sys.stderr, flush=True)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        asked = int(self._received or 0)
        if trainer.world_size > 1:
            numbers = trainer.strategy.reduce(torch.tensor(asked, device=trainer.strategy.root_device), reduce_op="max")
            asked = int(numbers)
        if not asked:
            return
        path = _save(trainer)
        if trainer.is_global_zero:
            saved = f"{path} is saved, and the same command resumes there" if path else "no checkpoint is kept"
            name = signal.Signals(asked).name
            print(
                f"recondense: stopped by {name} after step {trainer.global_step}; {saved}", file=sys.stderr, flush=True
            )
        raise Stopped(128 + asked)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _save(trainer: L.Trainer) -> str | None:
    """Have the Trainer's checkpoint callback save now, so that its records (best, last) stay right."""
    checkpoint = trainer.checkpoint_callback
    if not isinstance(checkpoint, ModelCheckpoint):
        return None
    candidates = checkpoint._monitor_candidates(trainer)
    if checkpoint._last_global_step_saved == trainer.global_step:
        return checkpoint._last_checkpoint_saved
    if checkpoint.monitor is None and checkpoint.save_top_k != 0:
        checkpoint._save_topk_checkpoint(trainer, candidates)
        checkpoint._save_last_checkpoint(trainer, candidates)
        return checkpoint.best_model_path
    path = checkpoint.format_checkpoint_name(candidates)
    trainer.save_checkpoint(path)
    return path
