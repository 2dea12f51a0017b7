"""The fits of a run: the recovery, stage by stage, and the control beside it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from recondense import processes
from recondense.config import stages as stages_module
from recondense.config.schema import WORK, Config, RecoveryConfig
from recondense.config.stages import Stage
from recondense.data.loader import RecoveryData, ShuffledWindows, num_rows
from recondense.data.texts import Texts
from recondense.errors import UserError
from recondense.models import loading
from recondense.models.layer_store import layer_store
from recondense.plan import Plan
from recondense.progress import progress
from recondense.recovery.fit import FINAL, fit, precision_of
from recondense.recovery.module import RecoveryModule
from recondense.recovery.teacher_cache import CachedTeacher, keep_predictions, key_of
from recondense.recovery.teachers import OtherTeacher, same_vocabulary
from recondense.run.inputs import keep_inputs
from recondense.run.measure import Measure

USED_BY_TEACHERS = ("input_ids", "position_ids")
log = logging.getLogger(__name__)

MakeCallbacks = Callable[[str, Sequence[str], Sequence[Path]], Sequence[Callback]]


@dataclass
class Fits:
    """What the fits of a run share.

    Args:
        stages: in order; one where the recovery lists none.
        folder: of the run.
        streamed: called when a model larger than memory has been asked all, before it is brought in to be trained.
        done: what each stage of the recovery was, for summary.json.
    """

    config: Config
    stages: Sequence[Stage]
    folder: Path
    texts: Texts
    measure: Measure
    callbacks: MakeCallbacks
    loggers: Sequence[Logger]
    streamed: Callable[[], None] = lambda: None
    done: list[dict[str, Any]] = field(default_factory=list)

    def recover(self, module: RecoveryModule) -> None:
        """Train every stage, or what is left of them; adapters are merged at the end of theirs."""
        self.done = []
        sources = self._on_disk(module)
        if layer_store(module.model).streamed:
            self.streamed()
            module.release_original()
            with progress("the compressed model, whole"):
                layer_store(module.model).load_all()
        with self._without_original(module):
            for stage in self.stages:
                self._stage(stage, module, sources.get(stage.name))

    def _stage(self, stage: Stage, module: RecoveryModule, source: CachedTeacher | None) -> None:
        with self.measure.timed("recover"), self.measure.counted(stage.name):
            data, recovery = self._data(stage, module)
            module.begin(recovery, stage.name)
            module.source = source or self._teacher_of(stage, module)
            callbacks = self.callbacks(stage.name, self.measure.tasks, self.measure.include_path)
            self._fit(module, data, self.folder / stage.folder, callbacks)
            module.finish()
        module.source = "shared"
        if processes.is_first():
            self.done.append(self._describe(stage, recovery, data))

    def _without_original(self, module: RecoveryModule) -> AbstractContextManager[None]:
        """Inside, the memory of what the student does not use of the original is free, where nobody asks it."""
        trainer = self.config.trainer
        asked = any(_asks_original(stage.recovery) for stage in self.stages)
        if asked or module.teacher is None or (trainer.shards and self.config.recovery.control):
            return nullcontext()
        path = self.folder / WORK / f"original-{processes.rank()}.safetensors"
        # An engine that spreads weights would spread those of the original too, which are empty inside.
        return module.without_original(path) if trainer.shards else module.teacher.set_aside(path)

    def _on_disk(self, module: RecoveryModule) -> dict[str, CachedTeacher]:
        """The predictions that stages learn from disk, made where they are not there."""
        sources: dict[str, CachedTeacher] = {}
        for stage in self.stages:
            cached = stage.recovery.objective == "distill" and stage.recovery.teacher == "cached"
            if not cached or (self.folder / stage.folder / FINAL).exists():
                continue
            with self.measure.timed("teacher"):
                data, recovery = self._data(stage, module)
                sources[stage.name] = self._kept(module, data, recovery)
        return sources

    def _kept(self, module: RecoveryModule, data: RecoveryData, recovery: RecoveryConfig) -> CachedTeacher:
        used = data.train_dataloader().used()
        windows = {name: data.train_table[name][used] for name in USED_BY_TEACHERS if name in data.train_table}
        precision = precision_of(self.config.trainer, module.model.dtype)
        key = key_of(self.measure.weights, windows, recovery.teacher_top_k, recovery.temperature, precision)
        folder = Path(self.config.cache_dir) / "teacher" / key
        device = module.model.device.type
        autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed")
        k, temperature, batch_size = recovery.teacher_top_k, recovery.temperature, recovery.batch_size
        with processes.first_before_others():
            return keep_predictions(module.original, windows, folder, k, temperature, batch_size, autocast)

    def _teacher_of(self, stage: Stage, module: RecoveryModule) -> Any:
        """What a stage learns from where that is no file: the original, or another model, loaded now."""
        recovery = stage.recovery
        if recovery.objective != "distill" or recovery.teacher != "model":
            return "shared"
        path = str(recovery.teacher_path)
        settings = replace(self.config.model, path=path, revision=recovery.teacher_revision, tokenizer=None)
        try:
            with processes.first_before_others():  # a hub id is downloaded once
                model, tokenizer = loading.load(settings, path)
        except UserError as error:
            raise UserError(str(error).replace("model.path=", f"{stage.where}.teacher_path=", 1)) from error
        assert module.tokenizer is not None
        same_vocabulary(tokenizer, module.tokenizer, path)
        keep_inputs(self.folder, {f"weights of the teacher {path}": loading.weights_fingerprint(model)})
        return OtherTeacher(model, module.model, path)

    def control(self, module: RecoveryModule) -> None:
        """The original trained further for the same steps: its experts in the layers that the plan changes."""
        if self.measure.has("control"):
            return
        assert module.plan is not None
        settings = [stages_module.control_settings(stage.recovery) for stage in self.stages]
        with module.original() as model:
            control = RecoveryModule(
                model,
                settings[0],
                plan=Plan(model=module.plan.model),
                tokenizer=module.tokenizer,
                stage="control",
                trained_layers=module.plan.layers,
                later=settings[1:],
                computes_on=module.computes_on,  # the recovery may have left the weights to the first process
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
        if recovery.objective == "distill" and recovery.teacher == "cached":
            used = ShuffledWindows(train, recovery.batch_size, batches, self.config.seed, lambda: 0).used()
            numbers = torch.full((num_rows(train),), -1)
            numbers[used] = torch.arange(len(used))
            train = {**train, "window": numbers}
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


def _asks_original(recovery: RecoveryConfig) -> bool:
    """Whether a training computes what the original predicts."""
    return recovery.teacher == "shared" if recovery.objective == "distill" else recovery.validate_every > 0


def with_steps(recovery: RecoveryConfig, num_windows: int, where: str = "recovery") -> RecoveryConfig:
    """Settings with the optimiser steps in which every window is seen `epochs` times; the last step may see some again.

    Raises:
        UserError: a warm-up that is not over by then.
    """
    if recovery.epochs is None:
        return recovery
    steps = max(1, math.ceil(recovery.epochs * num_windows / (recovery.batch_size * recovery.accumulate_grad_batches)))
    if recovery.warmup_steps >= steps:
        raise UserError(
            f"{where}.warmup_steps={recovery.warmup_steps}: {where}.epochs={recovery.epochs:g} of {num_windows} "
            f"windows are {steps} steps, and the learning rate would never reach its peak; lower it or train for longer"
        )
    return replace(recovery, steps=steps)
