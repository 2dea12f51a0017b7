"""Checkpoints of training: their contents, and how they are written and read."""

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
    """Return a module's trained parameters by name, unsharded, on the CPU; empty on all processes except the first."""
    state = {}
    for name, value in module.named_parameters():
        if value.requires_grad:
            full = full_tensors.full_tensor(value)
            if processes.is_first():
                state[name] = full.cpu()  # together they would need too much of a GPU's memory
    return state


def check_checkpoint(content: Mapping[str, Any], module: nn.Module, plan: Plan) -> None:
    """Check that a checkpoint belongs to a plan.

    Raises:
        UserError: it belongs to another plan.
        AssertionError: a trained parameter is missing.
    """
    if Plan.from_dict(content["plan"]).operations != plan.operations:
        raise UserError("the checkpoint belongs to another plan; use another folder, or overwrite=true")
    names = {name for name, value in module.named_parameters() if value.requires_grad}
    missing = names - content["state_dict"].keys()
    assert not missing, f"not in the checkpoint: {sorted(missing)}"


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the periodic checkpoint of the latest step; None if there is none."""
    steps = {int(path.stem.removeprefix("step=")): path for path in folder.glob("step=*.ckpt") if "-" not in path.stem}
    return steps[max(steps)] if steps else None


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Save a checkpoint with torch.save, so that the file is complete or does not exist."""
    with replace_file(path) as aside, aside.open("wb") as file:
        torch.save(content, file)  # given a path, it would write the temporary name into the file


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint into CPU memory.

    Raises:
        UserError: the file is damaged.
    """
    damaged = UserError(
        f"{path} is damaged: it is not a complete checkpoint. Delete this file; the same command then resumes from the "
        "previous checkpoint, or trains from the start"
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
    """Writes a checkpoint under a temporary name in its folder and renames it; Lightning's own IO may copy it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read_checkpoint(Path(path))


class StepCheckpoint(ModelCheckpoint):
    """Saves only at the end of optimizer steps, because accumulated gradients are not part of a checkpoint.

    After a resume, Lightning's own callback would save in the middle of the first step, when global_step is still that
    of the checkpoint.
    """

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
