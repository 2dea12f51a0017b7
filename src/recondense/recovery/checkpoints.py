"""Checkpoints of a training: what they hold, and how they are written and read."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from recondense import processes
from recondense.errors import UserError
from recondense.files import replace_file
from recondense.plan import Plan
from recondense.recovery.engines import full_tensors

FINAL = "final.ckpt"


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The part of a module's state that trains: unsharded, on the CPU. Empty in all processes but the first."""
    state = {}
    for name, value in module.named_parameters():
        if value.requires_grad:
            full = full_tensors.full_tensor(value)
            if processes.is_first():
                state[name] = full.cpu()  # all of them together would take much of a GPU
    return state


def check_checkpoint(content: Mapping[str, Any], module: nn.Module, plan: Plan) -> None:
    """Refuse a checkpoint that was made under another plan. One of this plan holds all that trains.

    Raises:
        UserError: it was made under another.
    """
    if Plan.from_dict(content["plan"]).operations != plan.operations:
        raise UserError("the checkpoint belongs to another plan; start anew in another folder or overwrite=true")
    names = {name for name, value in module.named_parameters() if value.requires_grad}
    missing = names - content["state_dict"].keys()
    assert not missing, f"not in the checkpoint: {sorted(missing)}"


def newest_checkpoint(folder: Path) -> Path | None:
    """The periodic checkpoint of the latest step."""
    steps = {int(path.stem.removeprefix("step=")): path for path in folder.glob("step=*.ckpt") if "-" not in path.stem}
    return steps[max(steps)] if steps else None


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """torch.save, complete or not at all."""
    with replace_file(path) as aside, aside.open("wb") as file:
        torch.save(content, file)  # given the path it would write the name into the file


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, in the CPU's memory.

    Raises:
        UserError: the file is damaged.
    """
    damaged = UserError(
        f"{path} is damaged: it is not a complete checkpoint. Delete this file: the same command resumes from the "
        "checkpoint before it, or trains anew"
    )
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise damaged
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise damaged from error
    return content


class AsideCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then renames it: Lightning's own writes elsewhere and may copy."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read_checkpoint(Path(path))


class StepCheckpoint(ModelCheckpoint):
    """Saves at the end of optimiser steps only: gradients accumulated so far are in no checkpoint.

    Lightning would save again in the middle of the first step after a resume, when global_step is still that of the
    checkpoint it came from.
    """

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
