"""What a method makes of a model's sizes, from shapes alone: on the meta device, without weights and without texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from recondense import families, surgery
from recondense.errors import UserError
from recondense.methods.budget import routed_parameters, total_parameters
from recondense.methods.cdmoe import CDMoE
from recondense.methods.factorize import Decompose
from recondense.methods.moei2 import InterExpertPruning
from recondense.modules import CondensedMoE, SkippedLayer, Zeros
from recondense.plan import Drop, Factorize, Operation, Plan
from recondense.profiling import weights_bytes
from recondense.published import CDMOE, MIXTRAL, MOEI2, V2_LITE, Result, find, published_model

BytesOf = Callable[[nn.Module], int]
MXFP4_BITS = 4 + 8 / 32  # an exponent for every 32 numbers
WORDS = {"condense": "condensed", "prune": "pruned", "factorize": "factorized", "merge": "merged"}
# The average rank with which the paper's share of a model is met (arXiv 2411.01016).
AVERAGE_RANKS = {V2_LITE: 512, MIXTRAL: 2048}


class OutliningStep(Protocol):
    """A step of a method, as far as sizes go."""

    @property
    def left_open(self) -> str: ...

    def outline(self, model: PreTrainedModel) -> Sequence[Operation]: ...


@dataclass(frozen=True)
class Size:
    """What a model takes.

    Args:
        total: parameters, tied ones once.
        routed_experts: those of routed experts; in condensed layers, of the retained ones.
        active: parameters that a token meets: all but the routed experts that its router leaves out (of experts of
            different ranks, their mean; of merged experts at most so many, for two choices may be one group).
        weights_bytes: of parameters and persistent buffers, as they are stored.
    """

    total: int
    routed_experts: int
    active: int
    weights_bytes: int


@dataclass(frozen=True)
class LayerSize:
    """What becomes of one decoder layer.

    Args:
        outcome: in words; empty where nothing is done.
        experts_before, experts_after: routed experts; None in a layer without a router from the start.
        always_active: the experts that stay are active for every token.
        ranks: lowest and highest of its factors, None without any.
        bytes_before, bytes_after: of the whole decoder layer, as stored.
    """

    outcome: str
    experts_before: int | None
    experts_after: int | None
    always_active: bool
    ranks: tuple[int, int] | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Sizes:
    """Before and after.

    Args:
        operations: of the right shapes; their choices are made up.
        layers: by decoder-layer index.
    """

    before: Size
    after: Size
    operations: tuple[Operation, ...]
    layers: Mapping[int, LayerSize]


def quantization(config: PretrainedConfig) -> dict[str, Any]:
    """How a checkpoint's weights are quantised; empty if they are not."""
    found = getattr(config, "quantization_config", None) or {}
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def stored_bytes(model: PreTrainedModel, quantized: Mapping[str, Any]) -> BytesOf:
    """How many bytes a part of a model takes in its checkpoint, as files have them.

    FP8 is one byte a number of every Linear layer but the head and of the experts, and a 4-byte scale a block; MXFP4
    is 4 bits a number of the experts' weights and a byte for every 32. All else is stored in its own type.

    Raises:
        UserError: another quantisation.
    """
    if not quantized:
        return weights_bytes
    method = quantized.get("quant_method")
    if method not in ("fp8", "mxfp4"):
        raise UserError(
            f"model.path: the checkpoint is quantised by {method}, whose bytes are not known here (fp8 and mxfp4 are); "
            "model.dtype=bfloat16 counts it dequantised"
        )
    head = model.get_output_embeddings()
    linear = {id(each.weight) for each in model.modules() if isinstance(each, nn.Linear) and each is not head}

    def of(part: nn.Module) -> int:
        size = weights_bytes(part)
        for parameter in part.parameters():
            stacked = parameter.ndim == 3  # the experts'
            if method == "mxfp4" and stacked:
                size += round(parameter.numel() * MXFP4_BITS / 8) - parameter.nbytes
            elif method == "fp8" and (stacked or id(parameter) in linear):
                size += _fp8_bytes(parameter, quantized.get("weight_block_size")) - parameter.nbytes
        return size

    return of


def _fp8_bytes(weight: torch.Tensor, block: Sequence[int] | None) -> int:
    """Without a block size, one scale a matrix."""
    *stack, rows, columns = weight.shape
    high, wide = block or (rows, columns)
    return weight.numel() + 4 * math.prod(stack) * -(-rows // high) * -(-columns // wide)


def compare(model: PreTrainedModel, steps: Sequence[OutliningStep], bytes_of: BytesOf = weights_bytes) -> Sizes:
    """A model's sizes before and after a method; the model is left as it was.

    Args:
        model: on the meta device.
        steps: the method's, in order; each sees the shapes that the one before left.
        bytes_of: of the original's parts; what is changed is stored in the model's own type.

    Raises:
        UserError: a budget that the method cannot keep.
    """
    before, own = _size(model, bytes_of), _layers(model, bytes_of)
    with outlined(model, steps) as operations:
        after, left = _size(model, weights_bytes), _layers(model, weights_bytes)
        layers = {
            layer: LayerSize(
                *(_outcome(layer, operations), own[layer][0], left[layer][0] if own[layer][0] is not None else None),
                always_active=isinstance(families.get_block(model, layer), CondensedMoE),
                ranks=_ranks(layer, operations),
                bytes_before=own[layer][1],
                bytes_after=left[layer][1],
            )
            for layer in own
        }
    return Sizes(before, after, tuple(operations), layers)


@contextmanager
def outlined(model: PreTrainedModel, steps: Sequence[OutliningStep]) -> Iterator[list[Operation]]:
    """Inside, the model has the shapes that a method leaves, as an export has them; after, its own again."""
    operations: list[Operation] = []
    originals: dict[int, nn.Module] = {}
    try:
        for step in steps:
            chosen = step.outline(model)
            originals = {**surgery.restructure(model, Plan("", tuple(chosen))), **originals}
            operations += chosen
        for layer in originals:
            block = families.get_block(model, layer)
            if isinstance(block, CondensedMoE):
                block.fold()
        yield operations
    finally:
        for layer, block in originals.items():
            families.set_block(model, layer, block)


def _size(model: PreTrainedModel, bytes_of: BytesOf) -> Size:
    total = total_parameters(model)
    idle = 0.0
    for block in families.sparse_blocks(model).values():
        unused = max(0, block.num_experts - block.routing.top_k) / block.num_experts
        idle += unused * total_parameters(block.experts)
    return Size(total, routed_parameters(model), total - round(idle), bytes_of(model))


def _layers(model: PreTrainedModel, bytes_of: BytesOf) -> dict[int, tuple[int | None, int]]:
    """Routed experts (None: no router and none kept) and bytes of every decoder layer."""
    found: dict[int, tuple[int | None, int]] = {}
    sparse = families.sparse_blocks(model)
    width = families.facts(model.config).expert_width
    for layer, module in enumerate(families.decoder_layers(model)):
        block = families.get_block(model, layer)
        experts: int | None = None
        if layer in sparse:
            experts = sparse[layer].num_experts
        elif isinstance(block, CondensedMoE):
            experts = block.routed_width // width
        elif isinstance(block, SkippedLayer | Zeros):
            experts = 0
        found[layer] = experts, bytes_of(module)
    return found


def _outcome(layer: int, operations: Sequence[Operation]) -> str:
    words = []
    for operation in operations:
        if operation.layer == layer:
            whole = isinstance(operation, Drop) and operation.part == "block"
            words.append(WORDS.get(operation.kind) or ("removed whole" if whole else "without its MoE block"))
    return ", ".join(words)


def _ranks(layer: int, operations: Sequence[Operation]) -> tuple[int, int] | None:
    ranks = [
        rank
        for operation in operations
        if isinstance(operation, Factorize) and operation.layer == layer
        for each in operation.ranks.values()
        for rank in each
        if rank is not None
    ]
    return (min(ranks), max(ranks)) if ranks else None


def beside_published(model: PreTrainedModel, steps: Sequence[OutliningStep]) -> list[tuple[Result, Sizes]]:
    """The settings that a method's paper publishes of this very model, each with its sizes; empty if there are none.

    Args:
        model: on the meta device, as it is published.
        steps: of the command; the first says whose paper it is.
    """
    facts = families.facts(model.config)
    known = published_model(facts.model_type, facts.hidden_size, facts.num_layers, facts.num_experts)
    if known is None or not steps:
        return []
    found: dict[tuple[Any, ...], tuple[Result, list[OutliningStep]]] = {}  # some rows stand in two tables
    if isinstance(steps[0], CDMoE):
        for row in find(known.name, paper=CDMOE, method="cdmoe", fine_tuned=False):
            if row.num_layers is not None and row.num_experts is not None and row.memory_ratio is not None:
                step = CDMoE(num_experts=row.num_experts, num_layers=row.num_layers)
                found.setdefault((-row.num_experts, row.num_layers), (row, [step]))
    elif isinstance(steps[0], InterExpertPruning):
        for row in find(known.name, paper=MOEI2, method="moei2"):
            assert row.pruned_ratio is not None and row.removed_expert_ratio is not None
            both: list[OutliningStep] = [InterExpertPruning(prune_ratio=row.pruned_ratio)]
            if row.removed_expert_ratio > row.pruned_ratio:
                both.append(Decompose(average_rank=AVERAGE_RANKS[known.name]))
            found[(row.removed_expert_ratio,)] = row, both
    return [(row, compare(model, own)) for _, (row, own) in sorted(found.items())]
