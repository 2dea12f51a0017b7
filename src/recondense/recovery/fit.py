"""One fit: a Lightning Trainer around a RecoveryModule that checkpoints at intervals and goes on exactly."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.utils.deterministic
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from torch.distributed.fsdp import FSDPModule

from recondense import processes
from recondense.config.schema import TrainerConfig
from recondense.data.loader import RecoveryData
from recondense.errors import UserError
from recondense.files import remove_partial, replace_file
from recondense.models import decoder, views
from recondense.recovery.engines import trainer as trainer_module
from recondense.recovery.engines import twin as twin_module
from recondense.recovery.module import RecoveryModule, trained_state
from recondense.recovery.random_states import random_states, set_random_states

FINAL = "final.ckpt"
SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")  # variables that `seed_everything` sets

log = logging.getLogger(__name__)


def fit(
    module: RecoveryModule,
    data: RecoveryData,
    folder: Path,
    trainer: TrainerConfig,
    seed: int,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
) -> Path:
    """Train, or go on from the newest checkpoint in a folder, or do nothing if the training is done.

    All processes come here together. An engine that shards leaves the module without weights in all but the first.
    Besides weights everything is afterwards as it was, however the fit ends.

    Args:
        module: what to train; left with the trained weights, frozen and in evaluation mode.
        folder: of checkpoints. `final.ckpt` is there when the training is done.

    Returns:
        the final checkpoint.

    Raises:
        UserError: a checkpoint that is damaged or belongs to another plan, a precision that would round weights.
    """
    final = folder / FINAL
    with _process_put_back():
        L.seed_everything(seed, verbose=False)
        module.prepare()
        try:
            if processes.broadcast(final.exists()):
                if processes.is_first():
                    log.info("%s: found trained in %s", module.stage, final)
            else:
                _train(module, data, folder, trainer, callbacks, loggers)
            processes.barrier()
            if not twin_module.is_hollow(module):
                state = read_checkpoint(final)
                module.check_checkpoint(state)
                unknown = module.load_state_dict(state["state_dict"], strict=False).unexpected_keys
                assert not unknown, unknown
        finally:
            module.rest()
            data.trainer = None
    return final


def _refuse_rounding(trainer: TrainerConfig, precision: str, dtype: torch.dtype) -> None:
    """What would round the weights of a model that is not in bf16."""
    if dtype == torch.bfloat16 or not (precision == "bf16-true" or (trainer.deepspeed and precision == "bf16-mixed")):
        return
    instead = "trainer.precision=32-true" if trainer.deepspeed else "trainer.precision=bf16-mixed"
    raise UserError(
        f"trainer.precision={precision} would round all weights of a {dtype} model, frozen ones included; use "
        f"{instead}, or model.dtype=bfloat16"
    )


def _train(
    module: RecoveryModule,
    data: RecoveryData,
    folder: Path,
    settings: TrainerConfig,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
) -> None:
    """Train the module, or the twin that an engine takes over, and write `final.ckpt`."""
    device = module.computes_on
    if processes.is_first():
        remove_partial(folder)
    precision = precision_of(settings, module.model.dtype)
    _refuse_rounding(settings, precision, module.model.dtype)
    newest = processes.broadcast(newest_checkpoint(folder))
    if newest is not None and processes.is_first():
        log.info("%s: going on from %s", module.stage, newest)
    # DeepSpeed keeps copies in fp32 of its own.
    with nullcontext() if settings.deepspeed else module.training_in(precision), _brought_back(module, device):
        trained = _trained(module, settings)
        trained.train()
        lightning = _trainer(trained, folder, settings, precision, device, callbacks, loggers)
        with (
            _deterministic(settings.deterministic or device.type == "cpu"),
            decoder.checkpointing(trained.model, module.recovery.activation_checkpointing),
            decoder.compiling(trained.model, settings.compile),
        ):
            lightning.fit(trained, datamodule=data, ckpt_path=newest, weights_only=True)
        if lightning.interrupted or lightning.global_step < module.recovery.steps:
            raise KeyboardInterrupt
        assert module.plan is not None
        state = trained_state(trained)
        if processes.is_first():
            _save({"state_dict": state, "plan": module.plan.to_dict()}, folder / FINAL)


@contextmanager
def _brought_back(module: RecoveryModule, device: torch.device) -> Iterator[None]:
    """After, a module is on a device again: Lightning leaves every module on the CPU."""
    try:
        yield
    finally:
        if not twin_module.is_hollow(module):
            module.to(device)


def _trained(module: RecoveryModule, settings: TrainerConfig) -> RecoveryModule:
    """What the Trainer is given: the module, or a twin of it."""
    if not (settings.shards or settings.deepspeed):
        return module
    empty = settings.shards
    if empty:
        if processes.is_first():
            module.to("cpu")  # at home, so that the cards are the shards'
        else:
            twin_module.forget(module)
    twin = twin_module.twin_of(module, module.in_common(), empty)
    if empty:
        twin.shard = lambda: _shard(twin, module)
    return twin


def _shard(twin: RecoveryModule, home: RecoveryModule) -> None:
    """Blocks of the student and of the teacher are units of their own, so that a pass gathers only its own."""
    layers = list(decoder.decoder_layers(twin.model))
    originals = twin.originals()
    blocks = {layer: views.get_block(twin.model, layer) for layer in originals}
    student = {id(each) for each in twin.model.modules()}
    shared = [each for block in originals.values() for each in _outermost(block, student)]
    units = [*shared, *blocks.values(), *originals.values(), *layers]
    units = [unit for unit in dict.fromkeys(units) if any(True for _ in unit.parameters())]
    twin_module.shard(twin, home, units)
    if all(isinstance(unit, FSDPModule) for unit in units):
        lowest = min(i for i, layer in enumerate(layers) if any(each.requires_grad for each in layer.parameters()))
        order = [
            each for i in reversed(range(lowest, len(layers))) for each in (layers[i], blocks.get(i)) if each in units
        ]
        twin_module.prefetch_backwards(twin, order)


def _outermost(module: nn.Module, wanted: set[int]) -> Iterator[nn.Module]:
    """The modules in it that are wanted, by id, but none within another."""
    for child in module.children():
        if id(child) in wanted:
            yield child
        else:
            yield from _outermost(child, wanted)


class AsideCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then renames it: Lightning's own writes elsewhere and may copy."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        _save(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def _save(content: dict[str, Any], path: Path) -> None:
    """torch.save, complete or not at all."""
    with replace_file(path) as aside, aside.open("wb") as file:
        torch.save(content, file)  # given the path it would write the name into the file


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint of ours holds, in the CPU's memory.

    Raises:
        UserError: the file is damaged.
    """
    damaged = UserError(
        f"{path} is damaged: it is no whole checkpoint. Delete this file: the same command goes on from the checkpoint "
        "before it, or trains anew"
    )
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise damaged
    try:
        stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise damaged from error
    return stored


class StepCheckpoint(ModelCheckpoint):
    """Saves at the end of optimiser steps only: gradients accumulated so far are in no checkpoint.

    Lightning would save again in the middle of the first step after a resume, when global_step is still that of the
    checkpoint it came from.
    """

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def newest_checkpoint(folder: Path) -> Path | None:
    """The periodic checkpoint of the latest step."""
    found = {int(path.stem.removeprefix("step=")): path for path in folder.glob("step=*.ckpt") if "-" not in path.stem}
    return found[max(found)] if found else None


def precision_of(trainer: TrainerConfig, dtype: torch.dtype) -> str:
    """Lightning's precision; auto: a model in half precision computes in bf16, with what trains in fp32."""
    if trainer.precision != "auto":
        return trainer.precision
    return "32-true" if dtype == torch.float32 else "bf16-mixed"


def _trainer(
    module: RecoveryModule,
    folder: Path,
    settings: TrainerConfig,
    precision: str,
    device: torch.device,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
) -> L.Trainer:
    recovery = module.recovery
    accumulate = recovery.accumulate_grad_batches
    checkpoints = StepCheckpoint(
        dirpath=folder, filename="{step}", every_n_train_steps=recovery.checkpoint_every, save_on_train_epoch_end=False
    )
    return L.Trainer(
        **trainer_module.trainer_arguments(settings, device, module.data_dependent()),
        precision=precision,  # type: ignore[arg-type]
        max_steps=recovery.steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=recovery.gradient_clip,
        callbacks=[*callbacks, checkpoints],
        plugins=[AsideCheckpointIO(), *([trainer_module.Running()] if processes.grouped() else [])],
        logger=list(loggers) or False,
        log_every_n_steps=min(10, recovery.steps),
        val_check_interval=recovery.validate_every * accumulate or None,
        check_val_every_n_epoch=None if recovery.validate_every else 1,
        limit_val_batches=None if recovery.validate_every else 0,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Deterministic algorithms inside: on a CPU they cost nothing, and a killed run goes on bit for bit."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


@contextmanager
def _process_put_back() -> Iterator[None]:
    """After, random states and Lightning's seeds are as before, and gradients are on or off as before."""
    states, grad = random_states(), torch.is_grad_enabled()
    seeds = {name: os.environ.get(name) for name in SEEDS}
    try:
        yield
    finally:
        set_random_states(states)
        torch.set_grad_enabled(grad)
        for name, value in seeds.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
