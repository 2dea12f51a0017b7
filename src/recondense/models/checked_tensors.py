"""Safetensors files of recondense, with a checksum of their tensors in the header."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recondense.files import discard, replace_file

CHECKSUM = "xxh3_128"  # entry of the header

log = logging.getLogger(__name__)


def save_checked(tensors: Mapping[str, Tensor], path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors on the CPU, so that the file is complete or does not exist.

    Args:
        tensors: the tensors by name.
        path: the file.
        notes: further entries of the header.
    """
    needs = sum(tensor.nbytes for tensor in tensors.values())
    with replace_file(path, needs) as aside:
        save_file(dict(tensors), aside, {**(notes or {}), CHECKSUM: _checksum(tensors)})


def is_intact(path: Path) -> bool:
    """Return whether a file is there and is what `save_checked` wrote; a damaged one is removed, with a warning."""
    if not (path.exists() or path.is_symlink()):
        return False
    problem = _problem(path)
    if problem is not None:
        log.warning("%s is damaged (%s) and is made again", path, problem)
        discard(path)
    return problem is None


def _problem(path: Path) -> str | None:
    """Return what is wrong with a file, which is read completely; None if it is as it was written."""
    if path.is_dir():
        return "it is a folder"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum = (file.metadata() or {}).get(CHECKSUM)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    except SafetensorError as error:
        return f"it is no complete safetensors file: {error}"
    return None if checksum == _checksum(tensors) else "its checksum is missing or wrong"


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
