"""The fits of a run: the recovery, stage by stage, and the control beside it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from recondense import processes, summary
from recondense.config import Config, RecoveryConfig
from recondense.data import RecoveryData, num_rows
from recondense.fitting import fit
from recondense.measure import Measure
from recondense.plan import Plan
from recondense.recovery import RecoveryModule
from recondense.searching import Texts
from recondense.stages import Stage

log = logging.getLogger(__name__)

MakeCallbacks = Callable[[str, Sequence[str], Sequence[Path]], Sequence[Callback]]


@dataclass
class Fits:
    """What the fits of a run share.

    Args:
        stages: in order; one where the recovery lists none.
        folder: of the run.
        done: what each stage of the recovery was, for summary.json.
    """

    config: Config
    stages: Sequence[Stage]
    folder: Path
    texts: Texts
    measure: Measure
    callbacks: MakeCallbacks
    loggers: Sequence[Logger]
    done: list[dict[str, Any]] = field(default_factory=list)

    def recover(self, module: RecoveryModule) -> None:
        """Train every stage, or what is left of them; adapters are merged at the end of theirs."""
        self.done = []
        for stage in self.stages:
            with self.measure.timed("recover"), self.measure.counted(stage.name):
                data, recovery = self._data(stage, module)
                module.begin(recovery, stage.name)
                callbacks = self.callbacks(stage.name, self.measure.tasks, self.measure.include_path)
                self._fit(module, data, self.folder / stage.folder, callbacks)
                module.finish()
            if processes.is_first():
                self.done.append(self._describe(stage, recovery, data))

    def control(self, module: RecoveryModule) -> None:
        """The original trained further for the same steps: its experts in the layers that the plan changes."""
        if self.measure.has("control"):
            return
        assert module.plan is not None
        settings = [summary.control_settings(stage.recovery) for stage in self.stages]
        with module.original() as model:
            control = RecoveryModule(
                model,
                settings[0],
                plan=Plan(model=module.plan.model),
                tokenizer=module.tokenizer,
                stage="control",
                trained_layers=module.plan.layers,
                later=settings[1:],
            )
            with self.measure.timed("control"):
                for stage, own in zip(self.stages, settings, strict=True):
                    data, recovery = self._data(replace(stage, recovery=own), control)
                    alone = stage.name == "recovery"
                    control.begin(recovery, "control" if alone else f"control/{stage.name}")
                    folder = self.folder / "checkpoints" / "control"
                    callbacks = self.callbacks(control.stage, (), ())
                    self._fit(control, data, folder if alone else folder / Path(stage.folder).name, callbacks)
            self.measure.stage("control", control)

    def _fit(self, module: RecoveryModule, data: RecoveryData, folder: Path, callbacks: Sequence[Callback]) -> None:
        fit(module, data, folder, self.config.trainer, self.config.seed, callbacks, self.loggers)

    def _data(self, stage: Stage, module: RecoveryModule) -> tuple[RecoveryData, RecoveryConfig]:
        """What a stage trains on, and its settings with the steps that its epochs are."""
        recovery = stage.recovery
        train = self.texts.training(stage, "train", module.tokenizer)
        assert train is not None
        validation = self.texts.training(stage, "validation", module.tokenizer) if recovery.validate_every else None
        recovery = with_steps(recovery, num_rows(train), stage.where)
        batches = recovery.steps * recovery.accumulate_grad_batches
        return RecoveryData(train, validation, recovery.batch_size, batches, self.config.seed), recovery

    def _describe(self, stage: Stage, recovery: RecoveryConfig, data: RecoveryData) -> dict[str, Any]:
        names = ("objective", "trainable", "steps", "batch_size", "accumulate_grad_batches", "learning_rate")
        return {
            "name": stage.name,
            **{name: getattr(recovery, name) for name in names},
            "sequence_length": stage.data.sequence_length,
            "windows": num_rows(data.train_table),
            **self.texts.counts.get((stage.name, "train"), {}),
            "seconds": self.measure.counts[stage.name],
        }


def with_steps(recovery: RecoveryConfig, num_windows: int, where: str = "recovery") -> RecoveryConfig:
    """Settings with the optimiser steps in which every window is seen `epochs` times; the last step may see some again.

    Raises:
        ValueError: a warm-up that is not over by then.
    """
    if recovery.epochs is None:
        return recovery
    steps = max(1, math.ceil(recovery.epochs * num_windows / (recovery.batch_size * recovery.accumulate_grad_batches)))
    if recovery.warmup_steps >= steps:
        raise ValueError(
            f"{where}.warmup_steps={recovery.warmup_steps}: {where}.epochs={recovery.epochs:g} of {num_windows} "
            f"windows are {steps} steps, and the learning rate would never reach its peak; lower it or train for longer"
        )
    return replace(recovery, steps=steps)
