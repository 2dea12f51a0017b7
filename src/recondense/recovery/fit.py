"""Fit one stage with a Lightning Trainer, with periodic checkpoints and exact resume."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.utils.deterministic
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import nn

from recondense import processes
from recondense.config.schema import TrainerConfig
from recondense.data.loader import RecoveryData
from recondense.files import remove_partial
from recondense.models import decoder, moe_blocks
from recondense.recovery.checkpoints import (
    FINAL,
    AsideCheckpointIO,
    StepCheckpoint,
    check_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    trained_state,
)
from recondense.recovery.engines import fsdp2, training_copy
from recondense.recovery.engines import trainer as trainer_module
from recondense.recovery.engines.deepspeed import Zero
from recondense.recovery.finite_loss import StopAtNonFiniteLoss
from recondense.recovery.module import RecoveryModule
from recondense.recovery.precision import keep_trained_weights, refuse_rounding, resolve_precision
from recondense.recovery.random_states import random_states, set_random_states

SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")  # environment variables set by `seed_everything`

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
    """Train a stage to the end. It resumes from the newest checkpoint in the folder; a finished stage is only loaded.

    All processes must call this together. With an engine that shards weights, the module has weights only on the first
    process afterwards. Apart from the weights, the state of the process is restored however the fit ends. After
    training, the stage's adapters are merged. A fit that fails removes them; the next one resumes from a checkpoint.

    Args:
        module: the stage. Its model gets the trained weights, and is frozen and in evaluation mode afterwards.
        data: training and validation windows.
        folder: the folder of checkpoints. A finished training has a `final.ckpt`.
        trainer: engine, precision and devices.
        seed: the seed of all random numbers in training.
        callbacks, loggers: callbacks and loggers of the Trainer.

    Returns:
        The path of the final checkpoint.

    Raises:
        UserError: a checkpoint is damaged or belongs to another plan, the precision would round weights, there is
            nothing to train, or a loss is not finite.
        KeyboardInterrupt: the training was interrupted before its end.
    """
    final = folder / FINAL
    with _restore_process():
        L.seed_everything(seed, verbose=False)
        module.prepare()
        with _stop_training(module, data):
            if processes.broadcast(final.exists()):
                if processes.is_first():
                    log.info("%s: already trained, in %s", module.stage, final)
            else:
                _train(module, data, _Training(folder, trainer, callbacks, loggers))
            processes.barrier()
            if not training_copy.is_empty(module):
                content = read_checkpoint(final)
                check_checkpoint(content, module, module.student.plan)
                unknown = module.load_state_dict(content["state_dict"], strict=False).unexpected_keys
                assert not unknown, unknown
    module.merge_adapters()
    return final


@contextmanager
def _stop_training(module: RecoveryModule, data: RecoveryData) -> Iterator[None]:
    """Freeze the module after the context. If the fit fails, remove its adapters."""
    done = False
    try:
        yield
        done = True
    finally:
        module.stop_training()
        data.trainer = None
        if not done:
            module.remove_adapters()


@dataclass(frozen=True)
class _Training:
    """The arguments of `fit` that do not depend on the stage."""

    folder: Path
    trainer: TrainerConfig
    callbacks: Sequence[Callback]
    loggers: Sequence[Logger]


def _train(module: RecoveryModule, data: RecoveryData, training: _Training) -> None:
    """Train the module or its copy, and write `final.ckpt`."""
    settings, device = training.trainer, module.training_device
    assert device is not None
    if processes.is_first():
        remove_partial(training.folder)
    precision = resolve_precision(settings, module.model.dtype)
    refuse_rounding(settings, precision, module.model.dtype)
    newest = processes.broadcast(newest_checkpoint(training.folder) if processes.is_first() else None)
    if newest is not None and processes.is_first():
        log.info("%s: resuming from %s", module.stage, newest)
    # DeepSpeed keeps its own copies in fp32.
    in_fp32 = nullcontext() if settings.deepspeed else keep_trained_weights(module.model, precision)
    with in_fp32, _move_back(module, device):
        trained = _choose_trained(module, settings)
        trained.train()
        lightning = _make_trainer(trained, training, precision, device)
        with (
            deterministic_algorithms(settings.deterministic or device.type == "cpu"),
            decoder.checkpoint_layers(trained.model, module.settings.activation_checkpointing),
            decoder.compile_layers(trained.model, settings.compile),
        ):
            lightning.fit(trained, datamodule=data, ckpt_path=newest, weights_only=True)
        if lightning.interrupted or lightning.global_step < module.settings.steps:
            raise KeyboardInterrupt
        state = trained_state(trained, module.stage)
        if processes.is_first():
            content = {"state_dict": state, "plan": module.student.plan.to_dict()}
            save_checkpoint(content, training.folder / FINAL)


@contextmanager
def _move_back(module: RecoveryModule, device: torch.device) -> Iterator[None]:
    """Move a module back to its device after the context, because Lightning moves it to the CPU."""
    try:
        yield
    finally:
        if not training_copy.is_empty(module):
            module.to(device)


def _choose_trained(module: RecoveryModule, settings: TrainerConfig) -> RecoveryModule:
    """Return the module for the Trainer: this one, or a copy of it."""
    if not (settings.shards or settings.deepspeed):
        return module
    if settings.shards:
        if processes.is_first():
            module.to("cpu")  # so that GPUs have only shards
        else:
            training_copy.release_weights(module)
    module_copy = training_copy.make_copy(module, module.objects_to_share(), empty=settings.shards)
    if settings.shards:
        module_copy.shard = lambda: _shard(module_copy, module)
    return module_copy


def _shard(module_copy: RecoveryModule, module: RecoveryModule) -> None:
    """Shard the module's weights over all processes, into its copy."""
    strategy, weights = module_copy.trainer.strategy, dict(module.named_parameters())
    if isinstance(strategy, Zero):
        strategy.shard(module_copy, weights)
    else:
        originals = {int(layer): block for layer, block in module_copy.originals.items() if layer.isdigit()}
        fsdp2.shard(module_copy, weights, module_copy.model, originals)


def _sparse_modules(module: RecoveryModule) -> list[nn.Module]:
    """Return all MoE blocks, including the original's. In them the tokens decide which weights are used."""
    parts = dict.fromkeys([*module.model.modules(), *module.originals.modules()])
    return [part for part in parts if moe_blocks.is_sparse(part)]


def _make_trainer(module: RecoveryModule, training: _Training, precision: str, device: torch.device) -> L.Trainer:
    settings = module.settings
    checkpoints = StepCheckpoint(
        dirpath=training.folder,
        filename="{step}",
        every_n_train_steps=settings.checkpoint_every,
        save_on_train_epoch_end=False,
    )
    validate_every = settings.validate_every
    return L.Trainer(
        **trainer_module.trainer_arguments(training.trainer, device, _sparse_modules(module)),
        precision=precision,  # type: ignore[arg-type]
        max_steps=settings.steps,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip,
        callbacks=[*training.callbacks, StopAtNonFiniteLoss(), checkpoints],
        plugins=[AsideCheckpointIO(), trainer_module.StartedProcesses()],
        logger=list(training.loggers) or False,
        log_every_n_steps=min(10, settings.steps),
        val_check_interval=validate_every * settings.accumulate_grad_batches or None,
        check_val_every_n_epoch=None if validate_every else 1,
        limit_val_batches=None if validate_every else 0,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=training.folder,
    )


@contextmanager
def deterministic_algorithms(needed: bool) -> Iterator[None]:
    """Use deterministic algorithms inside the context: free on a CPU, and a killed run then resumes bit for bit."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    if needed:
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


@contextmanager
def _restore_process() -> Iterator[None]:
    """Restore random states, Lightning's seeds, the gradient mode and the handler of Ctrl-C after the context."""
    states, grad, on_interrupt = random_states(), torch.is_grad_enabled(), signal.getsignal(signal.SIGINT)
    seeds = {name: os.environ.get(name) for name in SEEDS}
    try:
        yield
    finally:
        set_random_states(states)
        torch.set_grad_enabled(grad)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN is not on_interrupt:  # as Lightning leaves it after Ctrl-C
            signal.signal(signal.SIGINT, on_interrupt)
        for name, value in seeds.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
