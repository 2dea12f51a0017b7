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

from recondense.models.classes import on_meta
from recondense.models.compressed_classes import has_bias
from recondense.models.decoder import decoder_layers, layers_prefix
from recondense.models.families import original_facts
from recondense.models.replacement_blocks import CondensedMoE
from recondense.models.views import SparseBlock, get_block, sparse_blocks


@dataclass(frozen=True)
class Counts:
    """Parameters of the model that a config describes.

    Args:
        total: in the whole model, tied ones once.
        routed_experts: in all routed experts, those in condensed layers included.
        expert: in one unfactorized routed expert, 3·D·F and its biases.
        router_row: in one expert's row of the router.
    """

    total: int
    routed_experts: int
    expert: int
    router_row: int


@cache
def _counts(text: str, kind: type[PretrainedConfig]) -> Counts:
    model = on_meta(kind.from_dict(json.loads(text)))
    facts = original_facts(model.config)
    view = next(iter(sparse_blocks(model).values()), None)
    bias = view is not None and has_bias(view.experts)
    return Counts(
        total=count_parameters(model),
        routed_experts=routed_parameters(model),
        expert=3 * facts.hidden_size * facts.expert_width + (2 * facts.expert_width + facts.hidden_size) * bias,
        router_row=0 if view is None else router_row_size(view),
    )


def parameter_counts(config: PretrainedConfig) -> Counts:
    """Parameters of the model that a config describes; built on the meta device, without weights.

    Raises:
        UserError: as `facts`.
    """
    return _counts(json.dumps(config.to_dict(), sort_keys=True, default=str), type(config))  # type: ignore[arg-type]


def routed_parameters(model: PreTrainedModel) -> int:
    """Parameters of the routed experts as they are now; those in condensed layers count as retained."""
    sparse = sum(count_parameters(block.experts) for block in sparse_blocks(model).values())
    blocks = [get_block(model, layer) for layer in range(len(decoder_layers(model)))]
    return sparse + sum(_retained_parameters(block) for block in blocks if isinstance(block, CondensedMoE))


def _retained_parameters(block: CondensedMoE) -> int:
    """Parameters of a condensed layer that came from routed experts."""
    width, hidden_size = block.routed_width, block.down_proj.out_features
    bias = 2 * width + hidden_size if block.down_proj.bias is not None and width else 0
    return width * 3 * hidden_size + bias


def count_parameters(module: nn.Module) -> int:
    """The number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def expert_size(block: SparseBlock) -> int:
    """Parameters of one routed expert; the mean over experts if their ranks differ."""
    return count_parameters(block.experts) // block.num_experts


def router_row_size(block: SparseBlock) -> int:
    """Parameters of one expert's row in the router."""
    return count_parameters(block.router) // block.num_experts


def bytes_outside_layers(model: PreTrainedModel) -> int:
    """Bytes of the parameters outside the decoder layers: embedding, final norm and head, tied ones once."""
    inside = layers_prefix()
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if not name.startswith(inside))


def largest_layer_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights of the largest decoder layer."""
    return max(sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in decoder_layers(model))


def weights_bytes(model: nn.Module) -> int:
    """Bytes that the weights of a model keep in memory: parameters and persistent buffers, each storage once.

    A storage counts in full: a parameter that is a slice of a larger tensor keeps all of that tensor in memory.
    """
    return _storage_bytes(_weights(model))


def resident_bytes(*modules: nn.Module) -> int:
    """Bytes that the parameters and buffers of several modules keep in memory, each storage once.

    A student and a teacher that share weights take less than the sum of the two, by what they share.
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
        # Of a weight that FSDP2 or ZeRO-3 has sharded, the part of this process.
        part = tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)
        storage = part.untyped_storage()
        # Storages without an address (meta device) are told apart by their identity.
        address = storage.data_ptr() if storage.device.type != "meta" else 0
        key = (str(storage.device), address) if address else ("no address", storage._cdata)
        sizes[key] = storage.nbytes()
    return sum(sizes.values())


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the whole model and of its routed experts; those in condensed layers count as retained."""
    return {"total": count_parameters(model), "routed_experts": routed_parameters(model)}
