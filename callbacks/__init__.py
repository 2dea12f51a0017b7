"""Callbacks for Lightning's Trainer and for Hydra. They use recondense; recondense never imports them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L

from recondense.config.schema import Config


def of_run(config: Config) -> Callable[..., list[L.Callback]]:
    """What `pipeline.run` asks for the callbacks of each fit.

    The pipeline itself measures the finished stages, in the model's own dtype; the callbacks follow the training.
    """

    def make(stage: str, tasks: Sequence[str], include_path: Sequence[Path]) -> list[L.Callback]:
        from callbacks.graceful_stop import GracefulStop
        from callbacks.lm_eval import LmEval
        from callbacks.profile import ProfileMemoryAndSpeed
        from callbacks.progress import TrainingProgress

        made: list[L.Callback] = [TrainingProgress(stage)]
        evaluation = config.evaluation
        if tasks and evaluation.every_n_steps:
            made.append(
                LmEval(
                    tasks,
                    every_n_steps=evaluation.every_n_steps,
                    at_end=False,
                    limit=evaluation.limit,
                    num_fewshot=evaluation.num_fewshot,
                    batch_size=evaluation.batch_size,
                    include_path=include_path,
                )
            )
        if stage != "pretrain" and not stage.startswith("control") and config.callbacks.profile.enabled:
            made.append(ProfileMemoryAndSpeed(at_start=False, at_end=False))
        return [*made, GracefulStop()]

    return make
