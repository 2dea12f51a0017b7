"""Checkpoints of training: their contents, and how they are written and read."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from recondense import processes
from recondense.errors import UserError
from recondense.files import discard, replace_file
from recondense.plan import Plan
from recondense.recovery.engines import full_tensors

FINAL = "final.ckpt"
BEGINNING = b"PK\x03\x04"
KEYS = {"state_dict", "plan"}
KEYS_TO_RESUME = {"optimizer_states", "random_states", "loops", "global_step"}

log = logging.getLogger(__name__)


def trained_state(module: nn.Module, stage: str) -> dict[str, Tensor]:
    """Return a module's trained parameters by name, unsharded, on the CPU; empty on all processes except the first.

    Raises:
        UserError: one of them is not finite.
    """
    state = {}
    for name, value in module.named_parameters():
        if value.requires_grad:
            full = full_tensors.full_tensor(value)
            if processes.is_first():
                state[name] = full.cpu()  # together they would need too much of a GPU's memory
    broken = processes.broadcast([name for name, value in state.items() if not value.isfinite().all()])
    if broken:
        text = f"{stage}: the training diverges: {broken[0]} is not finite any more, so that it is not saved"
        processes.refuse(f"{text}. Lower recovery.learning_rate, or check the training data")
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
    """Return the periodic checkpoint of the latest step; None if there is none.

    A damaged one is removed, with a warning, if there is an earlier one that is intact.

    Raises:
        UserError: the only checkpoint is damaged.
    """
    steps = {int(path.stem.removeprefix("step=")): path for path in folder.glob("step=*.ckpt") if "-" not in path.stem}
    paths = [steps[step] for step in sorted(steps, reverse=True)]
    intact = next((path for path in paths if _problem(path) is None), None)
    if paths and intact is None:
        raise _damaged(paths[0])
    for path in paths[: paths.index(intact)] if intact else ():
        log.warning("%s is damaged (%s); training goes on from %s", path, _problem(path), intact)
        discard(path)
    return intact


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Save a checkpoint with torch.save, so that the file is complete or does not exist."""
    with replace_file(path) as aside, aside.open("wb") as file:
        torch.save(content, file)  # given a path, it would write the temporary name into the file


def read_checkpoint(path: Path, keys: Set[str] | None = None) -> dict[str, Any]:
    """Read a checkpoint into CPU memory.

    Args:
        path: the file.
        keys: what it holds beside `KEYS`; None for a final checkpoint or one to resume from, as its name says.

    Raises:
        UserError: the file is damaged.
    """
    if _problem(path) is not None:
        raise _damaged(path)
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if keys is None:
        keys = set() if path.name == FINAL else KEYS_TO_RESUME
    if not isinstance(content, dict) or not content.keys() >= KEYS | keys:
        raise _damaged(path)
    return content


def _problem(path: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it is as it was written. torch checks no checksums itself."""
    try:
        with path.open("rb") as start:
            if start.read(len(BEGINNING)) != BEGINNING:  # zipfile would allow bytes before it, but torch does not
                return "it does not begin like a checkpoint"
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, zlib.error) as error:
        return f"it is not a complete checkpoint: {error}"
    return None if damaged is None else f"the checksum of {damaged} is wrong"


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged: {_problem(path) or 'it is no checkpoint of recondense'}. Delete this file; the same "
        "command then resumes from the previous checkpoint, or trains from the start"
    )


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
