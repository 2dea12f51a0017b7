"""A copy of a module that FSDP2 and ZeRO train in its place. Under FSDP2 and ZeRO-3 its weights are sharded.

The module itself stays in the memory of the first process. After training it gets the trained weights from the last
checkpoint. The other processes keep no weights of the module.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from torch import nn

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
