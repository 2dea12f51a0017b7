"""Callbacks for Lightning's Trainer and for Hydra; recondense.callbacks in Python. Only the command imports them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from recondense.config.schema import Config

if TYPE_CHECKING:  # Hydra imports this package for every command, and Lightning takes seconds
    from lightning.pytorch.callbacks import Callback


Timed = Callable[[str], AbstractContextManager[None]]


def untimed(part: str) -> AbstractContextManager[None]:
    """Count no seconds."""
    return nullcontext()


def callback_maker(config: Config) -> Callable[..., list[Callback]]:
    """Return the function with which `pipeline.run` makes the callbacks of each fit.

    The callbacks only follow the training. The pipeline measures the result stages itself, in the model's own dtype.
    """

    def make(stage: str, tasks: Sequence[str], include_path: Sequence[Path], timed: Timed = untimed) -> list[Callback]:
        from recondense.callbacks.graceful_stop import GracefulStop
        from recondense.callbacks.lm_eval import LmEval
        from recondense.callbacks.profile import ProfileMemoryAndSpeed
        from recondense.callbacks.progress import TrainingProgress
        from recondense.callbacks.training_metrics import TrainingMetrics

        callbacks: list[Callback] = [TrainingProgress(stage)]
        if stage != "pretrain":
            callbacks.append(TrainingMetrics())
        evaluation = config.evaluation
        if tasks and evaluation.every_n_steps:
            callbacks.append(
                LmEval(
                    tasks,
                    every_n_steps=evaluation.every_n_steps,
                    at_start=True,
                    at_end=evaluation.at_end,
                    limit=evaluation.limit,
                    total_limit=evaluation.periodic_limit,
                    num_fewshot=evaluation.num_fewshot,
                    batch_size=evaluation.batch_size,
                    include_path=include_path,
                    timed=lambda: timed("evaluate"),
                )
            )
        if stage != "pretrain" and not stage.startswith("control") and config.callbacks.profile.enabled:
            callbacks.append(ProfileMemoryAndSpeed(at_start=False, at_end=False))
        return [*callbacks, GracefulStop()]

    return make
