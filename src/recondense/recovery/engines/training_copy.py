"""A copy of a module that FSDP2 and ZeRO train in its place. Under FSDP2 and ZeRO-3 its weights are sharded.

The module itself stays in the memory of the first process. After training it gets the trained weights from the last
checkpoint. The other processes keep no weights of the module.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from recondense.recovery.engines.deepspeed import Zero
from recondense.recovery.engines.full_tensors import shard_like

Module = TypeVar("Module", bound=LightningModule)


def make_copy(module: Module, shared: Iterable[object], empty: bool) -> Module:
    """Copy a module's structure. The parameters are new objects that share the module's memory or are on the meta
    device.

    Args:
        module: the module.
        shared: objects that are not copied; the copy refers to the same objects as the module.
        empty: whether the copy's parameters are on the meta device.
    """
    memo: dict[int, Any] = {id(item): item for item in shared}
    for parameter in module.parameters():
        data = parameter.detach().to("meta") if empty else parameter.detach()
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.clone()
    return copy.deepcopy(module, memo)


def release_weights(module: nn.Module) -> None:
    """Free the memory of a module's parameters; their names, shapes and dtypes do not change."""
    empty: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in empty:
                    data = parameter.detach().to("meta")
                    empty[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
                part._parameters[name] = empty[id(parameter)]


def is_empty(module: nn.Module) -> bool:
    """Return whether the weights are in another process's memory."""
    return any(parameter.is_meta for parameter in module.parameters())


def shard(module_copy: LightningModule, home: nn.Module, units: Sequence[nn.Module]) -> None:
    """Shard the first process's weights over all processes, into an empty copy. Must be called in `configure_model`.

    On each process, only one parameter at a time is unsharded.

    Args:
        module_copy: the empty copy.
        home: the original module, whose parameters have memory only in the first process.
        units: modules that are unsharded as units, in the order of a forward pass. The rest of the copy is another
            unit.
    """
    weights = dict(home.named_parameters())
    if isinstance(module_copy.trainer.strategy, Zero):
        for name, parameter in module_copy.named_parameters():
            weight = _on_device(weights[name], module_copy.trainer.strategy.root_device)
            torch.utils.swap_tensors(parameter, nn.Parameter(weight, requires_grad=parameter.requires_grad))
            module_copy.trainer.strategy.partition(parameter)
        return
    assert module_copy.device_mesh is not None
    mesh, device = module_copy.device_mesh["data_parallel"], module_copy.trainer.strategy.root_device
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(module_copy, mesh=mesh)
    _materialize(module_copy, device)
    with torch.no_grad():
        for name, parameter in module_copy.named_parameters():
            parameter.copy_(shard_like(_on_device(weights[name], device), mesh, parameter))


def _on_device(weight: Tensor, device: torch.device) -> Tensor:
    """Return the first process's weight on the device; on other processes, an uninitialized tensor of its shape."""
    return (
        torch.empty(weight.shape, dtype=weight.dtype, device=device) if weight.is_meta else weight.detach().to(device)
    )


def _materialize(module: nn.Module, device: torch.device) -> None:
    """Allocate the shards of an empty module; its buffers already have memory."""
    buffers = [(part, name, value) for part in module.modules() for name, value in part._buffers.items()]
    module.to_empty(device=device)
    for part, name, value in buffers:
        part._buffers[name] = None if value is None else value.to(device)


def prefetch_backwards(root: nn.Module, units: Sequence[nn.Module]) -> None:
    """Make the backward pass unshard units in the order of the student's layers.

    By default, FSDP2 uses the order of all forward passes since the last backward pass, and would also unshard the
    teacher's units.

    Args:
        root: the root unit.
        units: the units that a backward pass reaches, in its order.
    """
    chain = [root, *units]
    for unit, following in zip(chain, [*chain[1:], chain[-1]], strict=True):
        assert isinstance(unit, FSDPModule) and isinstance(following, FSDPModule)
        unit.set_modules_to_backward_prefetch([following])


@contextmanager
def unshard_root(module: nn.Module) -> Iterator[None]:
    """Unshard the weights of FSDP2's root unit (embeddings, head) inside the context, for use outside a step.

    ZeRO-3 unshards weights automatically when they are used.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
