"""Lightning's strategies for FSDP2 and DeepSpeed, with checkpoints in one form: that of a single process.

Trained parameters and the optimiser's state, whole, in one file that the first process writes. So a fit goes on with
another number of processes, and loads no pickles.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

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


def _kept(tensor: Tensor) -> Tensor | None:
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


class Sharded(OneForm, ModelParallelStrategy):
    """Lightning's FSDP2, but steps run in the module's forward, and checkpoints are those of one process."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        # The module itself is the root unit: what lies in no other is gathered for the whole of a step.
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
                parameters[name].copy_(self._own(value, parameters[name]))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        state["state"] = {
            number: {name: _kept(whole(value)) if value.ndim else value for name, value in own.items()}
            for number, own in state["state"].items()
        }
        return state

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            own = {
                number: {
                    name: self._own(value, parameters[number]) if value.ndim else value for name, value in each.items()
                }
                for number, each in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": own})

    def _own(self, value: Tensor, like: Tensor) -> DTensor:
        return scattered(value.to(self.root_device), self.device_mesh["data_parallel"], like)


class Zero(OneForm, DeepSpeedStrategy):
    """Lightning's DeepSpeed, but checkpoints are those of one process, and it runs on CPUs too.

    On CPUs it shows that a recovery works before cards are paid for; nobody trains so.

    Args:
        leaves: blocks in which the data decide what runs: ZeRO-3 gathers them as a whole, or processes whose tokens
            take different ways would wait for each other.
    """

    def __init__(self, *args: Any, leaves: Iterable[nn.Module] = (), **kwargs: Any) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Importing DeepSpeed sets a level, and so does Lightning.
        kwargs.setdefault("logging_level", logging.getLogger("DeepSpeed").level or logging.WARNING)
        super().__init__(*args, **kwargs)
        self._leaves = list(leaves)

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed asks for an index

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the batches of a step; DeepSpeed would once more.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # DeepSpeedStrategy's own allows cards only

    def setup_distributed(self) -> None:
        import deepspeed.ops

        if self.root_device.type == "cpu":
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        from deepspeed.utils import set_z3_leaf_module

        self._init_config_if_needed()
        for leaf in self._leaves if self.zero_stage_3 else ():
            set_z3_leaf_module(leaf, True)
        yield

    def partition(self, parameter: nn.Parameter) -> None:
        """Keep this process's part of a parameter of the first process's."""
        import deepspeed

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
            own = deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0, enabled=self.zero_stage_3)
            with torch.no_grad(), own:
                parameters[name].copy_(value)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self._adamw(optimizer)
        step = next(iter(inner.state.values()))["step"]
        state: dict[int, dict[str, Any]] = {}
        groups = []
        for group, parameters in zip(inner.param_groups, self._groups(), strict=True):
            numbers = range(len(state), len(state) + len(parameters))
            for number, parameter in zip(numbers, parameters, strict=True):
                moments = {name: _kept(safe_get_full_optimizer_state(parameter, name)) for name in MOMENTS}
                state[number] = {"step": step.clone(), **moments}
            groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": list(numbers)})
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        (optimizer,), (state,) = self.optimizers, checkpoint["optimizer_states"]
        inner, zero = self._adamw(optimizer), self.deepspeed_engine.optimizer
        flat = zero.fp32_partitioned_groups_flat if self.zero_stage_3 else zero.single_partition_of_fp32_groups
        for each in flat:
            inner.state[each] = {
                "step": state["state"][0]["step"].clone(),
                **{name: torch.zeros_like(each.data) for name in MOMENTS},
            }
        if not self.zero_stage_3:
            zero._lazy_init_hp_params_optimizer_state()
        for group, saved in zip(inner.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        parameters = [parameter for group in self._groups() for parameter in group]
        for number, parameter in enumerate(parameters):
            for name in MOMENTS:
                value = state["state"][number][name].to(self.root_device)
                safe_set_full_optimizer_state(parameter, value, name)

    def _adamw(self, optimizer: Any) -> Optimizer:
        return getattr(optimizer, "_optimizer", optimizer).optimizer

    def _groups(self) -> list[list[nn.Parameter]]:
        """What the module's optimiser was made of; DeepSpeed's has flat partitions in their place."""
        assert self.lightning_module is not None
        return [group["params"] for group in self.lightning_module.parameter_groups()]  # type: ignore[operator,union-attr]


def needs_all(strategy: Strategy) -> bool:
    """Whether a forward pass of what a strategy trains needs all processes."""
    return isinstance(strategy, Sharded) or (isinstance(strategy, Zero) and strategy.zero_stage_3)


def has_leaves(strategy: Strategy) -> bool:
    """Whether a strategy gathers some modules as a whole: ZeRO-3's leaves."""
    return isinstance(strategy, Zero) and strategy.zero_stage_3
