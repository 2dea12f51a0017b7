"""FSDP2: every weight is sharded over the processes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from recondense.recovery.engines.full_tensors import PlainCheckpoints, full_tensor, shard_like, to_first_process


class Sharded(PlainCheckpoints, ModelParallelStrategy):
    """Lightning's FSDP2 strategy. Steps run in the module's forward; checkpoints are as for one process."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        # The module itself is the root unit, so weights in no other unit are unsharded during the entire step.
        with self.precision_plugin.train_step_context():
            return self._forward_redirection(self.model, self.lightning_module, "training_step", *args, **kwargs)  # type: ignore[arg-type]

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._forward_redirection(self.model, self.lightning_module, "validation_step", *args, **kwargs)  # type: ignore[arg-type]

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        with torch.no_grad():
            for name, value in checkpoint["state_dict"].items():
                parameters[name].copy_(self._shard(value, parameters[name]))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        state["state"] = {
            number: {
                name: to_first_process(full_tensor(value)) if value.ndim else value for name, value in moments.items()
            }
            for number, moments in state["state"].items()
        }
        return state

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            sharded = {
                number: {
                    name: self._shard(value, parameters[number]) if value.ndim else value
                    for name, value in moments.items()
                }
                for number, moments in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": sharded})

    def _shard(self, value: Tensor, like: Tensor) -> DTensor:
        return shard_like(value.to(self.root_device), self.device_mesh["data_parallel"], like)
