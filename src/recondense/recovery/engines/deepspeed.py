"""DeepSpeed ZeRO, stages 2 and 3."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from recondense.recovery.engines.full_tensors import (
    MOMENTS,
    PlainCheckpoints,
    copy_to_device,
    to_first_process,
)


class Zero(PlainCheckpoints, DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy. Checkpoints are the same as those of one process, and it also runs on CPUs.

    Running on CPUs is meant for tests of a recovery, not for training.

    Args:
        leaves: MoE blocks, each of which ZeRO-3 unshards as a unit. Otherwise processes whose tokens are routed to
            different experts would wait for each other forever.
    """

    def __init__(self, *args: Any, leaves: Iterable[nn.Module] = (), **kwargs: Any) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Keep the logging level: both the import of DeepSpeed and Lightning would change it.
        kwargs.setdefault("logging_level", logging.getLogger("DeepSpeed").level or logging.WARNING)
        super().__init__(*args, **kwargs)
        self._leaves = list(leaves)

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed needs an index

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has already divided the loss by the number of batches per step; DeepSpeed must not do so again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # that of DeepSpeedStrategy only allows GPUs

    def setup_distributed(self) -> None:
        import deepspeed.ops

        if self.root_device.type == "cpu":
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would have to be compiled
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        from deepspeed.utils import set_z3_leaf_module

        self._init_config_if_needed()
        for leaf in self._leaves if self.zero_stage_3 else ():
            set_z3_leaf_module(leaf, True)
        yield

    def shard(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Shard weights over all processes, one at a time. Must be called in `configure_model`.

        Args:
            module: the copy that is trained, without weights.
            weights: the weights by name, which have memory only in the first process.
        """
        import deepspeed

        for name, parameter in module.named_parameters():
            weight = copy_to_device(weights[name], self.root_device)
            torch.utils.swap_tensors(parameter, nn.Parameter(weight, requires_grad=parameter.requires_grad))
            holder = nn.ParameterList([parameter])
            deepspeed.zero.Init(module=holder, remote_device=self.remote_device, config_dict_or_path=self.config)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        for name, value in checkpoint["state_dict"].items():
            value = value.to(self.root_device)
            safe_set_full_fp32_param(parameters[name], value.float())
            full = deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0, enabled=self.zero_stage_3)
            with torch.no_grad(), full:
                parameters[name].copy_(value)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self._adamw(optimizer)
        self._link_states()
        step = next(iter(inner.state.values()))["step"]
        state: dict[int, dict[str, Any]] = {}
        groups = []
        for group, parameters in zip(inner.param_groups, self._groups(), strict=True):
            numbers = range(len(state), len(state) + len(parameters))
            for number, parameter in zip(numbers, parameters, strict=True):
                moments = {name: to_first_process(safe_get_full_optimizer_state(parameter, name)) for name in MOMENTS}
                state[number] = {"step": step.clone(), **moments}
            groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": list(numbers)})
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        (optimizer,), (state,) = self.optimizers, checkpoint["optimizer_states"]
        inner, zero = self._adamw(optimizer), self.deepspeed_engine.optimizer
        flat = zero.fp32_partitioned_groups_flat if self.zero_stage_3 else zero.single_partition_of_fp32_groups
        for partition in flat:
            inner.state[partition] = {
                "step": state["state"][0]["step"].clone(),
                **{name: torch.zeros_like(partition.data) for name in MOMENTS},
            }
        self._link_states()
        for group, saved in zip(inner.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        parameters = [parameter for group in self._groups() for parameter in group]
        for number, parameter in enumerate(parameters):
            for name in MOMENTS:
                value = state["state"][number][name].to(self.root_device)
                safe_set_full_optimizer_state(parameter, value, name)

    def _link_states(self) -> None:
        """Connect all parameters to their states under ZeRO-2.

        DeepSpeed does so after the first step of the first group of parameters, when the other groups have no states.
        """
        zero = self.deepspeed_engine.optimizer
        if not self.zero_stage_3:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _adamw(self, optimizer: Any) -> Optimizer:
        return getattr(optimizer, "_optimizer", optimizer).optimizer

    def _groups(self) -> list[list[nn.Parameter]]:
        """Return the parameters of the module's optimizer by group; DeepSpeed's optimizer has only flat partitions."""
        assert self.lightning_module is not None
        return [group["params"] for group in self.lightning_module.parameter_groups()]  # type: ignore[operator,union-attr]
