"""Shard and unshard tensors, and give the checkpoints of all engines the same form."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from recondense import processes

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def full_tensor(parameter: Tensor) -> Tensor:
    """Return an unsharded parameter in the highest precision that the engine keeps. All processes must call this."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        full: Tensor | None = safe_get_full_fp32_param(parameter)
        return parameter.detach() if full is None else full
    return parameter.detach()


def num_dimensions(parameter: Tensor) -> int:
    """Return the number of dimensions of the unsharded parameter; under ZeRO-3 the parameter itself is empty."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def to_first_process(tensor: Tensor) -> Tensor | None:
    """Return a tensor in CPU memory on the first process, and None on the others, which do not need it."""
    return tensor.cpu() if processes.is_first() else None


def shard_like(full: Tensor, mesh: DeviceMesh, like: Tensor) -> DTensor:
    """Shard the first process's tensor in the same way as another tensor."""
    assert isinstance(like, DTensor)
    return distribute_tensor(full, mesh, like.placements)


def copy_to_device(weight: Tensor, device: torch.device) -> Tensor:
    """Return the first process's weight on the device; on other processes, an uninitialized tensor of its shape."""
    if weight.is_meta:
        return torch.empty(weight.shape, dtype=weight.dtype, device=device)
    return weight.detach().to(device)


class PlainCheckpoints(Strategy):
    """Writes the same checkpoints as a single process: Lightning's plain ones, without the module's weights.

    The module itself adds the trained weights.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True
