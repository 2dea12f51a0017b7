"""A module's twin, whose frozen weights are shards: what FSDP2 and ZeRO train.

The module itself, at home in the first process's memory, gets what was trained from the last checkpoint; the other
processes keep none.
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
from recondense.recovery.engines.full_tensors import scattered

Module = TypeVar("Module", bound=LightningModule)


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
            parameter.copy_(scattered(_on_device(weights[name], device), mesh, parameter))


def _on_device(weight: Tensor, device: torch.device) -> Tensor:
    """The first process's weight on its device; room for it on that of another."""
    return (
        torch.empty(weight.shape, dtype=weight.dtype, device=device) if weight.is_meta else weight.detach().to(device)
    )


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
