"""The trainings of a run: the recovery, stage by stage, and the control."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense import processes
from recondense.config.schema import WORK, Config, RecoveryConfig
from recondense.config.stages import Stage, control_settings
from recondense.data.loader import RecoveryData, ShuffledWindows, num_rows
from recondense.data.tokens import StageTokens
from recondense.errors import UserError
from recondense.full_disk import format_bytes
from recondense.models import loading
from recondense.models.layer_store import layer_store
from recondense.models.tensor_store import Disk, Memory
from recondense.models.tokenizers import load_tokenizer
from recondense.plan import Plan
from recondense.recovery import trainable
from recondense.recovery.checkpoints import FINAL
from recondense.recovery.fit import fit
from recondense.recovery.local import LocalRecovery, training_bytes
from recondense.recovery.local_layer import Errors
from recondense.recovery.module import RecoveryModule
from recondense.recovery.precision import resolve_precision
from recondense.recovery.teacher_cache import CachedTeacher, cache_key, keep_predictions
from recondense.recovery.teachers import OtherTeacher, Teacher, require_same_vocabulary
from recondense.run.inputs import keep_inputs
from recondense.surgery.student import Student

TEACHER_COLUMNS = (
    "input_ids",
    "position_ids",
)  # columns of the training windows that determine a teacher's predictions
DESCRIBED = ("objective", "trainable", "steps", "batch_size", "accumulate_grad_batches", "learning_rate")
DESCRIBED_IF_CHANGED = ("router_layers", "fold_coefficients", "local_inputs", "cross_entropy_share", "hidden_share")
DEFAULTS = {entry.name: entry.default for entry in fields(RecoveryConfig) if entry.name in DESCRIBED_IF_CHANGED}


log = logging.getLogger(__name__)


class MakeCallbacks(Protocol):
    """A function that returns the Lightning callbacks of a training, with or without the run's tasks."""

    def __call__(self, stage: str, *, with_tasks: bool) -> Sequence[Callback]: ...


class Record(Protocol):
    """The seconds of a run's parts, and the fingerprints of its inputs."""

    @property
    def inputs(self) -> Mapping[str, str]: ...

    @property
    def recovery_seconds(self) -> Mapping[str, float]: ...

    def timed(self, part: str) -> AbstractContextManager[None]: ...

    def timed_recovery(self, stage: str) -> AbstractContextManager[None]: ...


def prepare_student(student: Student, stages: Sequence[Stage], layers: Sequence[int] | None = None) -> None:
    """Check that every stage has something to train, and give the student its own copies of everything it trains.

    After that, the original shares no trained weights, regardless of the order of the stages.

    Args:
        student: the student.
        stages: stages of the recovery.
        layers: decoder layers whose experts and routers are trained; None for the layers of the plan.

    Raises:
        UserError: a stage has nothing to train.
    """
    layers = student.plan.layers if layers is None else layers
    recoveries = [stage.recovery for stage in stages if stage.recovery.objective != "none"]
    for settings in recoveries:
        trainable.check_trainable(student, layers, settings)
    if layer_store(student.model).streamed:
        return  # the blocks of its original are read from disk, so they never change
    trained = [_trained_weights(student.model, layers, settings) for settings in recoveries]
    if student.has_original:
        with student.original() as model:  # the control trains the original later, which must not change the student
            controls = [control_settings(settings) for settings in recoveries if settings.control]
            trained += [_trained_weights(model, student.plan.layers, settings) for settings in controls]
    student.separate(parameter for weights in trained for parameter in weights)


def _trained_weights(model: PreTrainedModel, layers: Sequence[int], settings: RecoveryConfig) -> list[nn.Parameter]:
    return list(trainable.trainable_parameters(model, layers, settings.parts, settings.router_layers).values())


@dataclass
class Recovery:
    """The trainings of a run.

    Args:
        config: settings of the run.
        stages: resolved stages of the recovery, in order.
        layers: decoder layers whose experts and routers are trained; None for the layers of the plan.
        folder: the run's folder.
        windows: windows of each stage, by the stage's name.
        tokenizer: tokenizer of the model.
        device: device on which the model computes. An engine may leave its weights on another one.
        record: counts seconds.
        callbacks: returns the Lightning callbacks of each training.
        loggers: loggers of the trainings.
    """

    config: Config
    stages: Sequence[Stage]
    layers: Sequence[int] | None
    folder: Path
    windows: Mapping[str, StageTokens]
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    record: Record
    callbacks: MakeCallbacks
    loggers: Sequence[Logger]

    def keep_predictions(self, student: Student) -> dict[str, CachedTeacher]:
        """Return the original's predictions on disk for each stage with a cached teacher. Missing ones are computed."""
        teachers: dict[str, CachedTeacher] = {}
        for stage in self.stages:
            cached = stage.recovery.objective == "distill" and stage.recovery.teacher == "cached"
            if cached and not (self.folder / stage.folder / FINAL).exists():
                with self.record.timed("teacher"):
                    data, settings = self._load_data(stage)
                    teachers[stage.name] = self._keep_predictions(student, data, settings)
        return teachers

    def recover(
        self, student: Student, cached: Mapping[str, CachedTeacher], load_whole: Callable[[], None] = lambda: None
    ) -> list[dict[str, Any]]:
        """Train the student, one stage after the other. The results of finished stages are loaded.

        Args:
            student: the student.
            cached: cached teachers by stage, from `keep_predictions`.
            load_whole: loads a streamed model into memory, before the first stage that needs all of it.

        Returns:
            A description of each stage for summary.json; empty in all processes except the first.
        """
        descriptions = []
        with self._free_original(student):
            for stage in self.stages:
                if stage.recovery.objective != "local":
                    load_whole()
                errors: Mapping[int, Errors] = {}
                with self.record.timed("recover"), self.record.timed_recovery(stage.name):
                    data, settings = self._load_data(stage)
                    if settings.objective == "local":
                        errors = self._train_locally(student, stage, settings, data)
                    else:
                        self._train(student, stage, settings, data, cached.get(stage.name))
                if settings.teacher == "model":
                    gc.collect()  # the module and its Trainer refer to each other, and the module holds the teacher
                if processes.is_first():
                    descriptions.append(self._describe(stage, settings, data, errors))
        return descriptions

    def _train(
        self, student: Student, stage: Stage, settings: RecoveryConfig, data: RecoveryData, cached: Teacher | None
    ) -> None:
        """Train the student in one stage."""
        module = RecoveryModule(
            student,
            settings,
            cached or self._load_teacher(stage, student),
            tokenizer=self.tokenizer,
            stage=stage.name,
            layers=self.layers,
            training_device=self.device,
        )
        self._fit(module, data, self.folder / stage.folder, self.callbacks(stage.name, with_tasks=True))

    def _train_locally(
        self, student: Student, stage: Stage, settings: RecoveryConfig, data: RecoveryData
    ) -> dict[int, Errors]:
        """Train each changed layer on the outputs of the original's block; hidden states are kept where a tape is."""
        where, store = self.config.data.calibration.tape, layer_store(student.model)
        storage = Memory() if where == "memory" else store.tensor_storage()
        if where == "disk" and not store.streamed:
            storage = Disk(self.folder / WORK / "local", device=self.device)
        folder, trainer = self.folder / stage.folder, self.config.trainer
        return LocalRecovery(
            student, settings, data, folder, trainer, storage, stage.name, self.layers, self.loggers
        ).run()

    @contextmanager
    def train_control(self, student: Student) -> Iterator[None]:
        """Train the same parts of the original for the same steps; inside, the model is this control."""
        with student.original() as model:
            control = Student(model, Plan(model=student.plan.model))
            with self.record.timed("control"):
                for stage in self.stages:
                    data, settings = self._load_data(replace(stage, recovery=control_settings(stage.recovery)))
                    folder, name = self.folder / "checkpoints" / "control", "control"
                    if stage.name != "recovery":
                        folder, name = folder / Path(stage.folder).name, f"control/{stage.name}"
                    module = RecoveryModule(
                        control,
                        settings,
                        tokenizer=self.tokenizer,
                        stage=name,
                        layers=student.plan.layers,
                        training_device=self.device,
                    )
                    self._fit(module, data, folder, self.callbacks(name, with_tasks=False))
            yield

    def _fit(self, module: RecoveryModule, data: RecoveryData, folder: Path, callbacks: Sequence[Callback]) -> None:
        fit(module, data, folder, self.config.trainer, self.config.seed, callbacks, self.loggers)

    def _free_original(self, student: Student) -> AbstractContextManager[None]:
        """Return a context in which the original uses no memory, if no training needs it."""
        trainer = self.config.trainer
        needed = any(_needs_original(stage.recovery) for stage in self.stages)
        if layer_store(student.model).streamed:  # it is not in memory, and loading the student releases it
            return nullcontext()
        if needed or not student.has_original or (trainer.shards and self.config.recovery.control):
            return nullcontext()
        if trainer.shards and not processes.is_first():  # the engine removes this process's weights anyway
            student.release_original()
            return nullcontext()
        return student.offload_original(self.folder / WORK / f"original-{processes.rank()}.safetensors")

    def _keep_predictions(self, student: Student, data: RecoveryData, settings: RecoveryConfig) -> CachedTeacher:
        used = data.train_dataloader().used_windows()
        windows = {name: data.train_table[name][used] for name in TEACHER_COLUMNS if name in data.train_table}
        precision = resolve_precision(self.config.trainer, student.model.dtype)
        k, temperature = settings.teacher_top_k, settings.temperature
        key = cache_key(self.record.inputs["weights"], windows, k, temperature, precision)
        folder = Path(self.config.cache_dir) / "teacher" / key
        device = student.model.device.type
        autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed")
        with processes.let_first_go_ahead():
            return keep_predictions(student.original, windows, folder, k, temperature, settings.batch_size, autocast)

    def _load_teacher(self, stage: Stage, student: Student) -> Teacher | None:
        """Return the separate model that teaches a stage; None if the teacher is the original or there is none."""
        settings = stage.recovery
        if settings.objective != "distill" or settings.teacher != "model":
            return None
        path = str(settings.teacher_path)
        teacher = replace(self.config.model, path=path, revision=settings.teacher_revision, tokenizer=None)
        setting = f"{stage.where}.teacher_path"
        with processes.let_first_go_ahead():  # it downloads the model
            tokenizer = load_tokenizer(path, teacher, setting)
            model = loading.load_model(path, teacher, setting=setting)
        require_same_vocabulary(tokenizer, self.tokenizer, path)
        keep_inputs(self.folder, {f"weights of the teacher {path}": loading.weights_fingerprint(model)})
        return OtherTeacher(model, student.model, path)

    def _load_data(self, stage: Stage) -> tuple[RecoveryData, RecoveryConfig]:
        """Return the windows of a stage, and its settings with epochs converted to steps."""
        settings = stage.recovery
        windows = self.windows[stage.name]
        train = windows.train
        settings = with_steps(settings, num_rows(train), stage.where)
        batches = settings.steps * settings.accumulate_grad_batches
        if settings.objective == "distill" and settings.teacher == "cached":
            used = ShuffledWindows(train, settings.batch_size, batches, self.config.seed, lambda: 0).used_windows()
            numbers = torch.full((num_rows(train),), -1)
            numbers[used] = torch.arange(len(used))
            train = {**train, "window": numbers}
        return RecoveryData(train, windows.validation, settings.batch_size, batches, self.config.seed), settings

    def _describe(
        self, stage: Stage, settings: RecoveryConfig, data: RecoveryData, errors: Mapping[int, Errors]
    ) -> dict[str, Any]:
        return {
            "name": stage.name,
            **{name: getattr(settings, name) for name in DESCRIBED},
            **{name: value for name in DESCRIBED_IF_CHANGED if (value := getattr(settings, name)) != DEFAULTS[name]},
            "sequence_length": stage.data.sequence_length,
            "windows": num_rows(data.train_table),
            **self.windows[stage.name].counts,
            "seconds": self.record.recovery_seconds[stage.name],
            **({"layers": {str(layer): error for layer, error in errors.items()}} if errors else {}),
        }


def _needs_original(settings: RecoveryConfig) -> bool:
    """Return whether a training computes the original's predictions or the outputs of its blocks."""
    if settings.objective == "local":
        return True
    return settings.teacher == "shared" if settings.objective == "distill" else settings.validate_every > 0


def local_training_bytes(student: Student, stages: Sequence[Stage], layers: Sequence[int] | None) -> int:
    """Return the bytes that local recoveries need beside the layer that they train; 0 without one."""
    local = [stage.recovery for stage in stages if stage.recovery.objective == "local"]
    return max((training_bytes(student, settings, layers) for settings in local), default=0)


def log_footprint(student: Student) -> None:
    """Log the bytes of a student and its original on one shared backbone, and of two separate models."""
    if student.has_original and processes.is_first():
        footprint = student.footprint()
        sizes = footprint.with_original, footprint.student, footprint.apart
        log.info(
            "student and teacher share a backbone: %s in memory (only the student: %s; two separate models: %s)",
            *map(format_bytes, sizes),
        )


def with_steps(settings: RecoveryConfig, num_windows: int, where: str = "recovery") -> RecoveryConfig:
    """Return settings with `epochs` converted to steps, rounded up so that every window is used `epochs` times.

    Args:
        settings: settings of the training; without `epochs`, they are returned unchanged.
        num_windows: number of training windows.
        where: name of the settings' section, for the error message.

    Raises:
        UserError: the warm-up is not shorter than the training.
    """
    if settings.epochs is None:
        return settings
    steps = max(1, math.ceil(settings.epochs * num_windows / (settings.batch_size * settings.accumulate_grad_batches)))
    if settings.warmup_steps >= steps:
        raise UserError(
            f"{where}.warmup_steps={settings.warmup_steps}: {where}.epochs={settings.epochs:g} of {num_windows} "
            f"windows take {steps} steps, so the learning rate would never reach its maximum; use fewer warm-up steps "
            "or more epochs"
        )
    return replace(settings, steps=steps)
