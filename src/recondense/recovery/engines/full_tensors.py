"""Sharded tensors to full ones, and checkpoints of one form for all engines."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from recondense import processes

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def whole(parameter: Tensor) -> Tensor:
    """A parameter as one tensor, where it is kept in higher precision that; all processes ask for it together."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        found: Tensor | None = safe_get_full_fp32_param(parameter)
        return parameter.detach() if found is None else found
    return parameter.detach()


def num_dimensions(parameter: Tensor) -> int:
    """Of the whole parameter; ZeRO-3 leaves it empty."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def kept(tensor: Tensor) -> Tensor | None:
    """In the first process's memory; the others need not have it."""
    return tensor.cpu() if processes.is_first() else None


def scattered(whole: Tensor, mesh: DeviceMesh, like: Tensor) -> DTensor:
    """The first process's tensor, spread as another is."""
    assert isinstance(like, DTensor)
    return distribute_tensor(whole, mesh, like.placements)


class OneForm(Strategy):
    """Checkpoints in the form of a single process: Lightning's plain ones, without what the module puts in itself."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # what trains is put in by the module

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True
