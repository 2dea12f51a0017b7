"""Arguments for Lightning's Trainer: the processes, and the engine that trains a module on them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from recondense import processes
from recondense.config.schema import TrainerConfig
from recondense.recovery.engines.deepspeed import Zero
from recondense.recovery.engines.fsdp2 import Sharded
from recondense.recovery.engines.full_tensors import full_tensor


class StartedProcesses(ClusterEnvironment):
    """Tells Lightning that the processes are already started, or that this one is alone, whatever variables say."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return processes.world_size()

    def set_world_size(self, size: int) -> None:
        pass  # the launcher has set it

    def global_rank(self) -> int:
        return processes.rank()

    def set_global_rank(self, rank: int) -> None:
        pass  # the launcher has set it

    def local_rank(self) -> int:
        return int(os.environ["LOCAL_RANK"]) if processes.has_group() else 0

    def node_rank(self) -> int:
        return processes.rank() // processes.local_world_size()


def trainer_arguments(settings: TrainerConfig, device: torch.device, leaves: Iterable[nn.Module]) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer for processes and engine; without a process group, one device.

    Args:
        settings: the settings of the trainer.
        device: the device of this process.
        leaves: MoE blocks, in which the tokens decide which experts run.
    """
    gpu = device.type == "cuda"
    if not processes.has_group():
        return {"accelerator": "gpu" if gpu else "cpu", "devices": [device.index or 0] if gpu else 1}
    here = processes.local_world_size()
    return {
        "accelerator": "gpu" if gpu else "cpu",
        # a single process uses the GPU of its settings, several processes use the GPU of their local rank
        "devices": [device.index or 0] if gpu and processes.world_size() == 1 else here,
        "num_nodes": processes.world_size() // here,
        "strategy": _strategy(settings, gpu, leaves),
    }


def _strategy(settings: TrainerConfig, gpu: bool, leaves: Iterable[nn.Module]) -> Strategy:
    timeout = timedelta(hours=settings.timeout_hours)
    if settings.strategy == "fsdp2":
        return Sharded(data_parallel_size=processes.world_size(), tensor_parallel_size=1, timeout=timeout)
    if settings.deepspeed:
        return Zero(config=zero_config(settings.strategy, gpu), timeout=timeout, leaves=leaves)
    # Buffers are equal and do not change. Unused experts get zero gradients (see low_rank.py), so none is missing.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DDPStrategy(timeout=timeout, **{buffers: False})  # type: ignore[arg-type]


def zero_config(strategy: str, gpu: bool) -> dict[str, Any]:
    """Return DeepSpeed's settings. The optimizer is torch's AdamW, even if its states are in CPU memory."""
    zero: dict[str, Any] = {
        "stage": 2 if strategy == "deepspeed_zero2" else 3,
        "contiguous_gradients": True,
        "overlap_comm": gpu,
    }
    if strategy == "deepspeed_zero3_offload":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
        zero["offload_param"] = {"device": "cpu", "pin_memory": gpu}
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would have to be compiled
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,  # used only in DeepSpeed's reports
        "steps_per_print": 10**9,
    }


def needs_all_processes(strategy: Strategy) -> bool:
    """Return whether a forward pass of the trained module needs all processes, because its weights are sharded."""
    return isinstance(strategy, Sharded) or (isinstance(strategy, Zero) and strategy.zero_stage_3)


def gradient_norm(strategy: Strategy, optimizer: Optimizer) -> Tensor | None:
    """Return the norm of the gradient of a step over all parameters and processes, before it is clipped.

    All processes must call this together, before the optimizer steps.

    Returns:
        a scalar; None for DeepSpeed, see `gradient_norm_after_step`.
    """
    if isinstance(strategy, Zero):
        return None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return full_tensor(torch.nn.utils.get_total_norm(gradients))


def gradient_norm_after_step(strategy: Strategy) -> float | None:
    """Return the same norm of the step that DeepSpeed has just done; None for other strategies."""
    if not isinstance(strategy, Zero):
        return None
    norm = strategy.deepspeed_engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def has_leaves(strategy: Strategy) -> bool:
    """Return whether a strategy unshards some modules as a unit (ZeRO-3's leaves)."""
    return isinstance(strategy, Zero) and strategy.zero_stage_3
