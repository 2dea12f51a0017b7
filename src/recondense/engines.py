"""What trains a module on several processes: DDP, FSDP2, DeepSpeed ZeRO-2 and ZeRO-3, through Lightning's strategies.

All keep their checkpoints in one form, that of a single process: trained parameters and the optimiser's state, whole,
in one file that the first process writes. So a fit goes on with another number of processes, and loads no pickles.

FSDP2 and ZeRO train a twin of the module: a structure of its own whose frozen weights are shards. The module itself, at
home in the first process's memory, gets what was trained from the last checkpoint; the other processes keep none.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from recondense import processes
from recondense.config import TrainerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
Module = TypeVar("Module", bound=LightningModule)


def needs_all(strategy: Strategy) -> bool:
    """Whether a forward pass of what a strategy trains needs all processes."""
    return isinstance(strategy, Sharded) or (isinstance(strategy, Zero) and strategy.zero_stage_3)


def has_leaves(strategy: Strategy) -> bool:
    """Whether a strategy gathers some modules as a whole: ZeRO-3's leaves."""
    return isinstance(strategy, Zero) and strategy.zero_stage_3


class Running(ClusterEnvironment):
    """The processes that run already: Lightning starts none."""

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
        """It is what it is."""

    def global_rank(self) -> int:
        return processes.rank()

    def set_global_rank(self, rank: int) -> None:
        """It is what it is."""

    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    def node_rank(self) -> int:
        return processes.rank() // processes.on_this_node()


def trainer_arguments(settings: TrainerConfig, device: torch.device, leaves: Iterable[nn.Module]) -> dict[str, Any]:
    """What Lightning's Trainer is told of processes and engine; without a process group as ever one device.

    Args:
        device: where this process computes.
        leaves: blocks in which the data decide what runs.
    """
    gpu = device.type == "cuda"
    if not processes.grouped():
        return {"accelerator": "gpu" if gpu else "cpu", "devices": [device.index or 0] if gpu else 1}
    here = processes.on_this_node()
    return {
        "accelerator": "gpu" if gpu else "cpu",
        # one process on a card of its own choice, else the card of each process's number
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
    # Buffers are equal and stay so; unused experts give zeros (see low_rank.py), so no parameter lacks a gradient.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DDPStrategy(timeout=timeout, **{buffers: False})  # type: ignore[arg-type]


def zero_config(strategy: str, gpu: bool) -> dict[str, Any]:
    """DeepSpeed's settings. Its optimiser is the module's, torch's AdamW, also where the states lie in CPU memory."""
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
        "zero_force_ds_cpu_optimizer": False,  # which would be compiled
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,  # of its reports alone
        "steps_per_print": 10**9,
    }


# ------------------------------------------------------------------------------------------------------- the twin


def twin_of(module: Module, shared: Iterable[object], empty: bool) -> Module:
    """The same structure with parameters of its own: on the module's memory, or on the meta device.

    Args:
        shared: what the twin has in common with the module.
        empty: the twin's parameters have no memory yet.
    """
    memo: dict[int, Any] = {id(each): each for each in shared}
    for parameter in module.parameters():
        data = parameter.detach().to("meta") if empty else parameter.detach()
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.clone()
    return copy.deepcopy(module, memo)


def forget(module: nn.Module) -> None:
    """Give the memory of a module's parameters back; names, shapes and types stay."""
    empty: dict[int, nn.Parameter] = {}
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                if id(parameter) not in empty:
                    data = parameter.detach().to("meta")
                    empty[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
                each._parameters[name] = empty[id(parameter)]


def is_hollow(module: nn.Module) -> bool:
    """Whether the weights are in another process."""
    return any(parameter.is_meta for parameter in module.parameters())


def shard(twin: LightningModule, home: nn.Module, units: Sequence[nn.Module]) -> None:
    """Spread an empty twin's weights over the processes, from the first one's home; called in `configure_model`.

    One parameter at a time is whole, on each process.

    Args:
        home: the module; its parameters have memory in the first process only.
        units: modules that are gathered one at a time, in the order in which a forward pass comes to them; the rest of
            the twin is one more.
    """
    weights = dict(home.named_parameters())
    if isinstance(twin.trainer.strategy, Zero):
        for name, parameter in twin.named_parameters():
            weight = _on_device(weights[name], twin.trainer.strategy.root_device)
            torch.utils.swap_tensors(parameter, nn.Parameter(weight, requires_grad=parameter.requires_grad))
            twin.trainer.strategy.partition(parameter)
        return
    assert twin.device_mesh is not None
    mesh, device = twin.device_mesh["data_parallel"], twin.trainer.strategy.root_device
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(twin, mesh=mesh)
    _materialise(twin, device)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(_scattered(_on_device(weights[name], device), mesh, parameter))


def _on_device(weight: Tensor, device: torch.device) -> Tensor:
    """The first process's weight on its device; room for it on that of another."""
    return (
        torch.empty(weight.shape, dtype=weight.dtype, device=device) if weight.is_meta else weight.detach().to(device)
    )


def _scattered(whole: Tensor, mesh: DeviceMesh, like: Tensor) -> DTensor:
    assert isinstance(like, DTensor)
    return distribute_tensor(whole, mesh, like.placements)


def _materialise(module: nn.Module, device: torch.device) -> None:
    """Memory for an empty module's shards; its buffers have theirs already."""
    buffers = [(each, name, value) for each in module.modules() for name, value in each._buffers.items()]
    module.to_empty(device=device)
    for each, name, value in buffers:
        each._buffers[name] = None if value is None else value.to(device)


def prefetch_backwards(root: nn.Module, units: Sequence[nn.Module]) -> None:
    """Let a backward pass gather in the order of the student, whatever passes went before.

    FSDP2's own order is that of all passes since the last backward; the teacher's would be gathered as well.

    Args:
        units: those that a backward pass comes to, in the order in which it does.
    """
    chain = [root, *units]
    for unit, following in zip(chain, [*chain[1:], chain[-1]], strict=True):
        assert isinstance(unit, FSDPModule) and isinstance(following, FSDPModule)
        unit.set_modules_to_backward_prefetch([following])


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, what lies in no unit (embeddings, head) can be used outside a training or validation step.

    ZeRO-3 gathers what is used of itself.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


# -------------------------------------------------------------------------------------------- what is in checkpoints


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


class Sharded(ModelParallelStrategy):
    """Lightning's FSDP2, but steps run in the module's forward, and checkpoints are those of one process."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        # The module itself is the root unit: what lies in no other is gathered for the whole of a step.
        with self.precision_plugin.train_step_context():
            return self._forward_redirection(self.model, self.lightning_module, "training_step", *args, **kwargs)  # type: ignore[arg-type]

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._forward_redirection(self.model, self.lightning_module, "validation_step", *args, **kwargs)  # type: ignore[arg-type]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # what trains is put in by the module

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

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
        return _scattered(value.to(self.root_device), self.device_mesh["data_parallel"], like)


class Zero(DeepSpeedStrategy):
    """Lightning's DeepSpeed, but checkpoints are those of one process, and it runs on CPUs too.

    On CPUs it shows that a recovery works before cards are paid for; nobody trains so.

    Args:
        leaves: blocks in which the data decide what runs: ZeRO-3 gathers them as a whole, or processes whose tokens
            take different ways would wait for each other.
    """

    def __init__(self, *args: Any, leaves: Iterable[nn.Module] = (), **kwargs: Any) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().__init__(*args, **kwargs)
        self._leaves = list(leaves)

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed asks for an index

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

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # what trains is put in by the module

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

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
