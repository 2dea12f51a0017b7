"""Local recovery: train each changed layer on the outputs of the original's block, one layer after another.

The data are the training windows of the stage, in the batches and the order that the other objectives have, so that
equal steps are equal tokens. Their hidden states are recorded layer by layer (`LocalTape`); a layer is then trained
without attention, without the head and without other layers. A tape keeps up to five states per token: at the layer,
the original's and the student's before and after it, and the block's input and target. It needs tokens × hidden size ×
bytes for each of them, in memory or on disk.

The loss is the squared error of the block's output relative to the mean square of the target. With
`local_inputs=student` the inputs are those of the compressed model, and the target is the original's state after the
layer minus the student's residual before its block, as in a refit: a layer also compensates for the errors below it.
Layers then depend on each other. Several processes share the windows of the tape, and the first one trains. With
`local_inputs=original` the inputs are the original's, so that layers are independent: each process trains its own.

A layer whose error did not become smaller keeps its weights. A finished layer is kept in the folder. Within a layer
nothing is kept: a killed run trains the layer again, with the same result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense import processes
from recondense.config.schema import RecoveryConfig, TrainerConfig
from recondense.data.loader import RecoveryData, Table
from recondense.errors import UserError
from recondense.files import fingerprint, remove_partial
from recondense.models import decoder, moe_blocks
from recondense.models.hooks import eval_mode
from recondense.models.layer_store import layer_store
from recondense.models.tensor_store import Storage
from recondense.plan import Plan
from recondense.progress import ProgressBar, progress
from recondense.recovery import trainable
from recondense.recovery.checkpoints import check_checkpoint, read_checkpoint, save_checkpoint
from recondense.recovery.fit import deterministic_algorithms
from recondense.recovery.local_layer import Errors, relative_error, train_block
from recondense.recovery.local_tape import BlockData, LocalTape
from recondense.recovery.precision import keep_trained_weights, refuse_rounding, resolve_precision
from recondense.recovery.trained_part import fold_coefficients
from recondense.surgery.student import Student

LOG_EVERY = 10  # steps
TRAINING_BYTES = 20  # per trained parameter: fp32 weight, gradient, AdamW's moments, and the weight before the training

log = logging.getLogger(__name__)


@dataclass
class LocalRecovery:
    """A local recovery of a student, which may be streamed. All processes must make and run it together.

    Args:
        student: the student; it must have its original.
        settings: the settings of the stage.
        data: its training windows.
        folder: the folder of finished layers.
        trainer: precision.
        storage: where hidden states are kept.
        stage: the prefix of logged metrics.
        layers: decoder layers whose experts are trained; None for the layers of the plan.
        loggers: they get the loss of each layer, and its relative error before and after.
    """

    student: Student
    settings: RecoveryConfig
    data: RecoveryData
    folder: Path
    trainer: TrainerConfig
    storage: Storage
    stage: str = "local"
    layers: Sequence[int] | None = None
    loggers: Sequence[Logger] = ()

    def run(self) -> dict[int, Errors]:
        """Train all layers. Layers that an earlier start of the run has finished are loaded.

        Returns:
            For each trained layer, ‖target − output‖_F / ‖target‖_F over the windows, before and after.

        Raises:
            UserError: there is no original or nothing to train, a loss is not finite, a finished layer is damaged, or
                the precision would round weights.
        """
        model = self.student.model
        if not self.student.has_original:
            raise UserError(f"{self.stage}: the student has no original, whose outputs a local recovery learns")
        refuse_rounding(self.trainer, self._precision, model.dtype)
        trained = trained_layers(self.student, self.settings, self.layers)
        if not layer_store(model).streamed:
            if self.settings.fold_coefficients:
                fold_coefficients(model, trained)
            weights = [_parameters(model, layer, self.settings).values() for layer in trained]
            self.student.separate(parameter for values in weights for parameter in values)
        if processes.is_first():
            remove_partial(self.folder)
        device = decoder.device(model)
        with eval_mode(model), deterministic_algorithms(self.trainer.deterministic or device.type == "cpu"):
            errors = self._load_finished(trained)
            pending = [layer for layer in trained if layer not in errors]
            with progress(self.stage, len(pending) * self.settings.steps) as bar:
                if pending:
                    errors |= self._train(trained, pending, bar)
        return {layer: errors[layer] for layer in trained}

    @property
    def _precision(self) -> str:
        return resolve_precision(self.trainer, self.student.model.dtype)

    @property
    def _from_student(self) -> bool:
        return self.settings.local_inputs == "student"

    def _load_finished(self, trained: Sequence[int]) -> dict[int, Errors]:
        """Load the layers that are finished; with inputs of the student, only those without a gap below them."""
        finished = processes.broadcast([layer for layer in trained if self._path(layer).exists()])
        if self._from_student:
            pending = [layer for layer in trained if layer not in finished]
            finished = [layer for layer in finished if layer < min(pending, default=layer + 1)]
        if finished and processes.is_first():
            log.info("%s: %d of %d layers are finished, in %s", self.stage, len(finished), len(trained), self.folder)
        return {layer: self._load(layer) for layer in finished}

    def _train(self, trained: Sequence[int], pending: Sequence[int], bar: ProgressBar) -> dict[int, Errors]:
        """Train layers, one at a time or, if they are independent, as many at a time as there are processes."""
        order = self.data.train_dataloader()
        used = order.used_windows()
        numbers = {window: number for number, window in enumerate(used)}
        table: Table = {name: column[used] for name, column in self.data.train_table.items()}
        tape = LocalTape(self.student, trained, table, self.settings.batch_size, self.storage, self._from_student)

        def rows(position: int) -> list[int]:
            return [numbers[window] for window in order.rows(position)]

        errors: dict[int, Errors] = {}
        at_once = 1 if self._from_student else processes.world_size()
        for start in range(0, len(pending), at_once):
            group = pending[start : start + at_once]
            mine: tuple[int, BlockData] | None = None
            for owner, layer in enumerate(group):
                tape.move_to(layer)
                data = tape.gather(tape.record(), owner)
                if data is not None:
                    mine = layer, data
            self._train_one(mine, rows, partial(self._report, bar, len(group)))
            del mine, data
            for layer in group:
                errors[layer] = self._load(layer)
                self._log_errors(layer, errors[layer])
        return errors

    def _train_one(
        self,
        mine: tuple[int, BlockData] | None,
        rows: Callable[[int], Sequence[int]],
        advance: Callable[[int, int, float], None],
    ) -> None:
        """Train the layer of this process, if it has one, and save it. A mistake in one process ends all of them."""
        problem = ""
        if mine is not None:
            layer, data = mine
            try:
                with layer_store(self.student.model).resident(layer):
                    self._train_layer(layer, data, rows, partial(advance, layer))
            except UserError as error:
                problem = f"{self.stage}, layer {layer}: {error}"
        if problems := [text for text in processes.gather(problem) if text]:
            processes.refuse(problems[0])

    def _train_layer(
        self,
        layer: int,
        data: BlockData,
        rows: Callable[[int], Sequence[int]],
        advance: Callable[[int, float], None],
    ) -> None:
        model, block, precision = self.student.model, moe_blocks.get_block(self.student.model, layer), self._precision
        device = decoder.device(model).type
        autocast = partial(torch.autocast, device, torch.bfloat16, enabled=precision == "bf16-mixed")
        before = relative_error(block, data, self.settings.batch_size)
        with self._unfrozen(layer) as parameters:
            saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            with keep_trained_weights(model, precision), torch.enable_grad():
                train_block(block, data, rows, self.settings, autocast, advance)
            after = relative_error(block, data, self.settings.batch_size)
            if not after < before:
                log.info("%s: layer %d keeps its weights: its error would be %.3f", self.stage, layer, after)
                _copy(saved, parameters)
                after = before
            content = {
                "state_dict": {name: parameter.detach().cpu() for name, parameter in parameters.items()},
                "plan": self.student.plan.to_dict(),
                "errors": {"error_before": before, "error_after": after},
            }
            save_checkpoint(content, self._path(layer))

    @contextmanager
    def _unfrozen(self, layer: int) -> Iterator[dict[str, nn.Parameter]]:
        """Freeze the model except the trained parameters of a layer; yield them by their names in the model."""
        self.student.model.requires_grad_(False)  # a streamed layer is not frozen when it is read
        parameters = _parameters(self.student.model, layer, self.settings)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        try:
            yield parameters
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None

    def _load(self, layer: int) -> Errors:
        """Load a finished layer into the model. For a streamed model, its block is offloaded, as after a refit."""
        processes.barrier()
        model, store = self.student.model, layer_store(self.student.model)
        name = self._block_name(layer) if store.streamed else ""
        block = store.load_back(name, lambda: moe_blocks.get_block(model, layer)) if store.streamed else None
        errors: Errors = store.notes(name) if block is not None else {}
        if block is None:
            content = read_checkpoint(self._path(layer), keys={"errors"})
            errors = content["errors"]
            with store.resident(layer), self._unfrozen(layer) as parameters:
                check_checkpoint(content, model, self.student.plan)
                _copy(content["state_dict"], parameters)
            with store.resident(layer):
                block = store.offload(moe_blocks.get_block(model, layer), name or None, errors)
        if store.streamed:
            self.student.replace_block(layer, block)
        return errors

    def _block_name(self, layer: int) -> str:
        """Return the key of a trained block, made from everything that its weights depend on."""
        store = layer_store(self.student.model)
        below = range(layer + 1) if self._from_student else [layer]
        plan: Plan = self.student.plan
        key = fingerprint(
            [store.context, [store.layer_keys(index) for index in below], plan.to_dict()["operations"]],
            [asdict(self.settings), self.data.seed, self._precision],
            {name: sha256(column.numpy().tobytes()).hexdigest() for name, column in self.data.train_table.items()},
        )
        return f"local-{layer:03d}-{key}"

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03d}.ckpt"

    def _report(self, bar: ProgressBar, layers: int, layer: int, step: int, loss: float) -> None:
        """Show and log a step of one of `layers` layers that are trained at the same time."""
        bar.advance(layers)
        if step % LOG_EVERY == 0 or step == self.settings.steps:
            bar.note(f"layer {layer}, loss {loss:.4g}")
            for logger in self.loggers:
                logger.log_metrics({f"{self.stage}/{layer}/loss": loss}, step)

    def _log_errors(self, layer: int, errors: Mapping[str, float]) -> None:
        if processes.is_first():
            sides = errors["error_before"], errors["error_after"]
            log.info("%s: layer %d: relative error %.3f -> %.3f", self.stage, layer, *sides)
            for logger in self.loggers:
                logger.log_metrics(
                    {f"{self.stage}/{layer}/{name}": value for name, value in errors.items()}, self.settings.steps
                )


def trained_layers(student: Student, settings: RecoveryConfig, layers: Sequence[int] | None = None) -> list[int]:
    """Return the layers that a local recovery trains, ascending, without those that have nothing to train.

    Raises:
        UserError: there is nothing to train.
    """
    layers = student.plan.layers if layers is None else layers
    trainable.check_trainable(student, layers, settings)
    if "experts" in settings.parts:
        layers = trainable.trainable_layers(student.model, layers)
    return [layer for layer in sorted(layers) if _parameters(student.model, layer, settings)]


def _parameters(model: PreTrainedModel, layer: int, settings: RecoveryConfig) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a layer's block, by name in the model."""
    return trainable.layer_parameters(model, layer, settings.parts)


def training_bytes(student: Student, settings: RecoveryConfig, layers: Sequence[int] | None = None) -> int:
    """Return the bytes that the training of the largest layer needs, beside the layer itself."""
    counts = [0]
    for layer in trained_layers(student, settings, layers):
        parameters = _parameters(student.model, layer, settings)
        counts.append(sum(parameter.numel() for parameter in parameters.values()))
    return TRAINING_BYTES * max(counts)


@torch.no_grad()
def _copy(state: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(state[name])
