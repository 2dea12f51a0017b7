"""Count the parameters and bytes of models and their parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from recondense.models.compressed_classes import has_bias
from recondense.models.decoder import decoder_layers, layers_prefix
from recondense.models.families import original_facts
from recondense.models.model_classes import on_meta
from recondense.models.moe_blocks import SparseBlock, get_block, sparse_blocks
from recondense.models.replacement_blocks import CondensedMoE


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters of the model that a config describes.

    Args:
        total: parameters of the entire model; tied parameters count once.
        routed_experts: parameters of all routed experts, including those in condensed layers.
        expert: parameters of one unfactorized routed expert: 3·D·F, and its biases.
        router_row: parameters of one expert's row in the router.
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
    width = facts.expert_width if view is None else max(view.widths)
    return Counts(
        total=count_parameters(model),
        routed_experts=routed_parameters(model),
        expert=3 * facts.hidden_size * width + (2 * width + facts.hidden_size) * bias,
        router_row=0 if view is None else router_row_size(view),
    )


def parameter_counts(config: PretrainedConfig) -> Counts:
    """Count the parameters of the model that a config describes. The model is made on the meta device.

    Raises:
        UserError: the family is not supported, or the shared experts have biases.
    """
    return _counts(json.dumps(config.to_dict(), sort_keys=True, default=str), type(config))  # type: ignore[arg-type]


def routed_parameters(model: PreTrainedModel) -> int:
    """Count the current parameters of the routed experts, including those retained in condensed layers."""
    sparse = sum(count_parameters(block.experts) for block in sparse_blocks(model).values())
    blocks = [get_block(model, layer) for layer in range(len(decoder_layers(model)))]
    return sparse + sum(_retained_parameters(block) for block in blocks if isinstance(block, CondensedMoE))


def _retained_parameters(block: CondensedMoE) -> int:
    """Count the parameters of a condensed layer that came from routed experts."""
    width, hidden_size = block.routed_width, block.down_proj.out_features
    bias = 2 * width + hidden_size if block.down_proj.bias is not None and width else 0
    return width * 3 * hidden_size + bias


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module; tied parameters count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def expert_size(block: SparseBlock) -> int:
    """Return the number of parameters of one routed expert; the mean over the experts if their ranks differ."""
    return count_parameters(block.experts) // block.num_experts


def present_expert(model: PreTrainedModel) -> int:
    """Return the parameters of an unfactorized routed expert of the model as it is, perhaps after narrowing.

    Experts of different widths count like the widest one. Without MoE layers, it is an expert of the config's model.
    """
    blocks = sparse_blocks(model).values()
    width = max((max(block.widths) for block in blocks), default=0)
    if not width:
        return parameter_counts(model.config).expert
    view = next(iter(blocks))
    hidden_size = original_facts(model.config).hidden_size
    return 3 * hidden_size * width + (2 * width + hidden_size) * has_bias(view.experts)


def channel_size(block: SparseBlock) -> int:
    """Return the number of parameters of one channel of a routed expert, with its two biases."""
    weights = block.weights
    return 3 * weights.down_EDF.shape[1] + (2 if weights.biases() else 0)


def router_row_size(block: SparseBlock) -> int:
    """Return the number of parameters of one expert's row in the router."""
    return count_parameters(block.router) // block.num_experts


def bytes_outside_layers(model: PreTrainedModel) -> int:
    """Return the bytes of the parameters outside the decoder layers: embedding, final norm and head."""
    inside = layers_prefix()
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if not name.startswith(inside))


def largest_layer_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the largest decoder layer's weights."""
    return max(sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in decoder_layers(model))


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of memory that a model's weights use: parameters and persistent buffers, each storage once.

    A storage counts in full, because a parameter that is a slice of a larger tensor keeps that tensor in memory.
    """
    return _storage_bytes(_weights(model))


def resident_bytes(*modules: nn.Module) -> int:
    """Return the bytes of memory that the parameters and buffers of several modules use, each storage once.

    Weights that a student and a teacher share therefore count once.
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
        # If FSDP2 or ZeRO-3 has sharded a weight, only this process's part is counted.
        part = tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)
        storage = part.untyped_storage()
        # Storages without an address (meta device) are distinguished by their identity.
        address = storage.data_ptr() if storage.device.type != "meta" else 0
        key = (str(storage.device), address) if address else ("no address", storage._cdata)
        sizes[key] = storage.nbytes()
    return sum(sizes.values())


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """Return the parameters of the entire model and of its routed experts, including those in condensed layers."""
    return {"total": count_parameters(model), "routed_experts": routed_parameters(model)}
