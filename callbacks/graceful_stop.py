"""Stop training on a signal: at the end of an optimizer step, with a checkpoint of that step."""

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
    """Raised to end the process: a SystemExit with the code 128 + signal number (143 for SIGTERM, 130 for Ctrl-C)."""


class GracefulStop(L.Callback):
    """On SIGTERM or Ctrl-C, finish the optimizer step, save a checkpoint and exit with code 143 or 130.

    On SIGTERM, Lightning itself saves nothing, may stop in the middle of gradient accumulation, and exits with code 0.
    On Ctrl-C it stops in the middle of a step. While training, this callback replaces Lightning's signal handlers. The
    Trainer's ModelCheckpoint writes the checkpoint under the same name as the periodic ones, so a resumed run finds it
    like any other. A second signal ends the process at once. If there are several processes, one of them receiving the
    signal is enough. Put this callback last in the list, so that the checkpoint includes what the other callbacks did
    at that step.

    Args:
        signals: names of the signals to handle.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGINT")) -> None:
        self.signals = tuple(signal.Signals[name] for name in signals)
        self._before: dict[signal.Signals, Any] = {}
        self._received: signal.Signals | None = None
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._received = None
        # Not earlier: the Trainer installs its own handlers after `on_fit_start`.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.signals}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:  # otherwise gradients are still being accumulated
            self._stop_if_signalled(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_signalled(trainer)  # the signal may have come after the last step, for example in an evaluation
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
        text = f"\n{self._received.name}: finishing this step; send it again to end at once"
        print(text, file=sys.stderr, flush=True)

    def _stop_if_signalled(self, trainer: L.Trainer) -> None:
        number = int(self._received or 0)
        if trainer.world_size > 1:
            tensor = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(tensor, reduce_op="max"))
        if not number:
            return
        path = _save(trainer)
        if trainer.is_global_zero:
            saved = f"{path} is saved, and the same command resumes there" if path else "no checkpoint was saved"
            name = signal.Signals(number).name
            print(
                f"recondense: stopped by {name} after step {trainer.global_step}; {saved}", file=sys.stderr, flush=True
            )
        raise Stopped(128 + number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _save(trainer: L.Trainer) -> str | None:
    """Save through the Trainer's checkpoint callback, so that its records (best, last) stay correct."""
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
