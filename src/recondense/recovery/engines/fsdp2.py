"""FSDP2: which modules are sharded as units, and how such a model is trained, loaded and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from recondense.models import decoder, moe_blocks
from recondense.recovery.engines.full_tensors import (
    PlainCheckpoints,
    copy_to_device,
    full_tensor,
    shard_like,
    to_first_process,
)


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


def shard(
    module: LightningModule, weights: Mapping[str, Tensor], model: PreTrainedModel, originals: Mapping[int, nn.Module]
) -> None:
    """Shard weights over all processes. Must be called in `configure_model`.

    Blocks of the student and of its original are separate units, so that a pass unshards only the weights that it uses.
    While the weights are distributed, each process has only one of them unsharded.

    Args:
        module: the copy that is trained, without weights. It is the root unit, for weights in no other unit.
        weights: the weights by name, which have memory only in the first process.
        model: the student's model, a part of `module`.
        originals: the original's blocks or decoder layers by index, parts of `module`.
    """
    layers = list(decoder.decoder_layers(model))
    blocks = {layer: moe_blocks.get_block(model, layer) for layer in originals}
    student = {id(part) for part in model.modules()}
    shared = [part for block in originals.values() for part in _outermost(block, student)]
    units = [*shared, *blocks.values(), *originals.values(), *layers]
    units = [unit for unit in dict.fromkeys(units) if any(True for _ in unit.parameters())]
    assert module.device_mesh is not None
    mesh, device = module.device_mesh["data_parallel"], module.trainer.strategy.root_device
    for unit in [*units, module]:
        fully_shard(unit, mesh=mesh)
    _materialize(module, device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(shard_like(copy_to_device(weights[name], device), mesh, parameter))
    lowest = min(i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters()))
    backwards = [unit for i in reversed(range(lowest, len(layers))) for unit in (layers[i], blocks.get(i))]
    _prefetch_backwards(module, [unit for unit in backwards if unit in units])


def _outermost(module: nn.Module, members: set[int]) -> Iterator[nn.Module]:
    """Yield the outermost submodules whose ids are among `members`."""
    for child in module.children():
        if id(child) in members:
            yield child
        else:
            yield from _outermost(child, members)


def _materialize(module: nn.Module, device: torch.device) -> None:
    """Allocate the shards of an empty module; its buffers already have memory."""
    buffers = [(part, name, value) for part in module.modules() for name, value in part._buffers.items()]
    module.to_empty(device=device)
    for part, name, value in buffers:
        part._buffers[name] = None if value is None else value.to(device)


def _prefetch_backwards(root: nn.Module, units: Sequence[nn.Module]) -> None:
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


def prepare_passes(module: nn.Module) -> None:
    """Run one pass of two tokens through FSDP2's root unit, if there is one, before any other pass.

    FSDP2 takes the module of the first pass for the root; a part of it must not be the first. All processes must call
    this together.
    """
    if isinstance(module, FSDPModule):
        device = next(parameter.device for parameter in module.parameters())
        with torch.no_grad():
            module(torch.zeros(1, 2, dtype=torch.long, device=device))


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
