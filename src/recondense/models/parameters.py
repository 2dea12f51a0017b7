"""The one way to count parameters and bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from recondense.models.blocks import CondensedMoE
from recondense.models.classes import on_meta
from recondense.models.compressed import has_bias
from recondense.models.decoder import decoder_layers
from recondense.models.families import original_facts
from recondense.models.views import get_block, sparse_blocks


@dataclass(frozen=True)
class Counts:
    """Parameters of the model that a config describes.

    Args:
        total: of the whole model, tied ones once.
        routed_experts: of all routed experts, those in condensed layers included.
        expert: of one whole routed expert, 3·D·F and its biases.
        router_row: of one expert's row in the router.
    """

    total: int
    routed_experts: int
    expert: int
    router_row: int


@cache
def _counts(text: str, kind: type[PretrainedConfig]) -> Counts:
    model = on_meta(kind.from_dict(json.loads(text)))
    found = original_facts(model.config)
    view = next(iter(sparse_blocks(model).values()), None)
    bias = view is not None and has_bias(view.experts)
    return Counts(
        total=sum(parameter.numel() for parameter in model.parameters()),
        routed_experts=routed_parameters(model),
        expert=3 * found.hidden_size * found.expert_width + (2 * found.expert_width + found.hidden_size) * bias,
        router_row=0 if view is None else view.router_row,
    )


def parameter_counts(config: PretrainedConfig) -> Counts:
    """Parameters of the model that a config describes; built on the meta device, without weights.

    Raises:
        UserError: as `facts`.
    """
    return _counts(json.dumps(config.to_dict(), sort_keys=True, default=str), type(config))  # type: ignore[arg-type]


def routed_parameters(model: PreTrainedModel) -> int:
    """Parameters of the routed experts as they are now; those in condensed layers count as retained."""
    sparse = sum(
        parameter.numel() for block in sparse_blocks(model).values() for parameter in block.experts.parameters()
    )
    blocks = [get_block(model, layer) for layer in range(len(decoder_layers(model)))]
    return sparse + sum(_routed_of(block) for block in blocks if isinstance(block, CondensedMoE))


def _routed_of(block: CondensedMoE) -> int:
    """Parameters of a condensed layer that came from routed experts."""
    width, hidden_size = block.routed_width, block.down_proj.out_features
    bias = 2 * width + hidden_size if block.down_proj.bias is not None and width else 0
    return width * 3 * hidden_size + bias


def total_parameters(model: nn.Module) -> int:
    """Parameters of the model as it is now, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weights_bytes(model: nn.Module) -> int:
    """Bytes that the weights of a model keep alive: parameters and persistent buffers, every storage once.

    Whole storages are counted: a parameter that is a slice of a larger tensor keeps all of that tensor in memory.
    """
    return _storage_bytes(_weights(model))


def resident_bytes(*modules: nn.Module) -> int:
    """Bytes of all storages reachable from several modules, every storage once.

    For a student and a teacher that share weights this is less than the sum of the two by exactly what they share.
    """
    return _storage_bytes(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    sizes: dict[tuple[Any, ...], int] = {}
    for tensor in tensors:
        # Of a weight that is spread over processes (by FSDP2, by ZeRO-3) this one's part.
        part = tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)
        storage = part.untyped_storage()
        # Storages without an address (meta device) are told apart by their identity.
        address = storage.data_ptr() if storage.device.type != "meta" else 0
        key = (str(storage.device), address) if address else ("no address", storage._cdata)
        sizes[key] = storage.nbytes()
    return sum(sizes.values())


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the whole model, and of its routed experts: those in condensed layers count as retained."""
    return {"total": count_parameters(model), "routed_experts": routed_parameters(model)}
