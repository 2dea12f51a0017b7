"""The sizes of a model before and after a method, computed from shapes on the meta device, without weights or texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from recondense.errors import UserError
from recondense.methods.step import Step
from recondense.models import decoder, families, moe_blocks
from recondense.models.parameters import count_parameters, routed_parameters, weights_bytes
from recondense.models.quantized import BytesOf
from recondense.models.removed_blocks import SkippedLayer, Zeros
from recondense.models.replacement_blocks import (
    CondensedMoE,
)
from recondense.operations import Condense, Drop, Factorize, Narrow, Operation
from recondense.plan import Plan
from recondense.surgery import execute

WORDS = {
    "condense": "condensed",
    "prune": "pruned",
    "narrow": "narrowed",
    "factorize": "factorized",
    "merge": "merged",
    "constant": "others constant",
}


@dataclass(frozen=True)
class Size:
    """The size of a model.

    Args:
        total: number of parameters; tied parameters count once.
        routed_experts: number of parameters of routed experts; in condensed layers, of the retained ones.
        active: number of parameters used per token: all except the routed experts that are not selected. Experts of
            different ranks or widths count with their mean. For merged experts this is an upper bound, because two of
            the selected experts may be in one group; for constants too, because they count only where a token must
            select them.
        weights_bytes: size in bytes of parameters and persistent buffers, as stored.
    """

    total: int
    routed_experts: int
    active: int
    weights_bytes: int


@dataclass(frozen=True)
class LayerSize:
    """The size of one decoder layer before and after.

    Args:
        outcome: the changes in words; empty if there are none.
        experts_before, experts_after: number of routed experts; None if the original layer has no router.
        always_active: whether the retained experts are active for every token.
        ranks: lowest and highest rank of the factors; None without factors.
        widths: smallest and largest width of the narrowed experts; None if none is narrower.
        bytes_before, bytes_after: size of the decoder layer with its attention, as stored.
    """

    outcome: str
    experts_before: int | None
    experts_after: int | None
    always_active: bool
    ranks: tuple[int, int] | None
    widths: tuple[int, int] | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model before and after a method.

    Args:
        before, after: sizes of the model.
        operations: operations with the correct shapes, but arbitrary choices of layers and experts.
        layers: sizes of each decoder layer, by index.
    """

    before: Size
    after: Size
    operations: tuple[Operation, ...]
    layers: Mapping[int, LayerSize]


def compare(model: PreTrainedModel, steps: Sequence[Step], bytes_of: BytesOf = weights_bytes) -> Sizes:
    """Compute a model's sizes before and after a method. The model is restored afterwards.

    Args:
        model: the model on the meta device.
        steps: steps of the method, in order. Each step sees the shapes after the earlier ones.
        bytes_of: returns the bytes of a part of the original. Changed parts are stored in the model's data type.

    Raises:
        UserError: the method cannot meet its budget.
    """
    before, original = _size(model, bytes_of), _layers(model, bytes_of)
    with outlined(model, steps) as operations:
        after, changed = _size(model, weights_bytes), _layers(model, weights_bytes, operations)
        layers = {
            layer: LayerSize(
                outcome=_outcome(layer, operations),
                experts_before=experts,
                experts_after=None if experts is None else changed[layer][0],
                always_active=isinstance(moe_blocks.get_block(model, layer), CondensedMoE),
                ranks=_ranks(layer, operations),
                widths=_widths(layer, operations),
                bytes_before=size,
                bytes_after=changed[layer][1],
            )
            for layer, (experts, size) in original.items()
        }
    return Sizes(before, after, tuple(operations), layers)


@contextmanager
def outlined(model: PreTrainedModel, steps: Sequence[Step]) -> Iterator[list[Operation]]:
    """Give the model the shapes of the exported compressed model until the context ends; yield the operations.

    Raises:
        UserError: a step cannot meet its budget, or needs one width but an earlier step leaves different ones.
    """
    operations: list[Operation] = []
    originals: list[dict[int, nn.Module]] = []
    uneven = False
    try:
        for step in steps:
            require_one_width(model, step, uneven)
            new = step.outline(model)
            uneven = uneven or (bool(step.left_open) and any(isinstance(operation, Narrow) for operation in new))
            originals.append(execute.restructure(model, Plan("", tuple(new))))
            operations += new
        for layer in dict.fromkeys(operation.layer for operation in operations):
            block = moe_blocks.get_block(model, layer)
            if isinstance(block, CondensedMoE):
                block.fold()
        yield operations
    finally:
        execute.restore(model, originals)


def require_one_width(model: PreTrainedModel, step: Step, uneven: bool = False) -> None:
    """Check that all experts have one width, if a step needs that.

    Args:
        model: the model after the earlier steps.
        step: the step.
        uneven: whether the search of an earlier step may decide on different widths.

    Raises:
        UserError: they do not.
    """
    widths = {width for block in moe_blocks.sparse_blocks(model).values() for width in block.widths}
    if step.needs_whole_experts and (uneven or len(widths) > 1):
        raise UserError(
            f"method: an earlier step gives experts different widths, but {type(step).__name__} needs one width; put "
            "the narrowing last, or narrow with allocation=uniform"
        )


def _size(model: PreTrainedModel, bytes_of: BytesOf) -> Size:
    total = count_parameters(model)
    idle = 0.0
    for block in moe_blocks.sparse_blocks(model).values():
        top_k, number = block.routing.top_k, block.num_experts
        constants = getattr(block.experts, "constants", None)
        num_constants, size = (0, 0) if constants is None else constants.shape
        idle += max(0, number - top_k) / number * (count_parameters(block.experts) - num_constants * size)
        idle += (num_constants - max(0, top_k - number)) * size
    return Size(total, routed_parameters(model), total - round(idle), bytes_of(model))


def _layers(
    model: PreTrainedModel, bytes_of: BytesOf, operations: Sequence[Operation] = ()
) -> dict[int, tuple[int | None, int]]:
    """Return the number of routed experts (None if a layer never had a router) and the bytes of each decoder layer."""
    sizes: dict[int, tuple[int | None, int]] = {}
    sparse = moe_blocks.sparse_blocks(model)
    retained = {operation.layer: len(operation.experts) for operation in operations if isinstance(operation, Condense)}
    width = families.facts(model.config).expert_width
    for layer, module in enumerate(decoder.decoder_layers(model)):
        block = moe_blocks.get_block(model, layer)
        experts: int | None = None
        if layer in sparse:
            experts = sparse[layer].num_experts
        elif isinstance(block, CondensedMoE):
            experts = retained.get(layer, block.routed_width // width)  # narrowed ones have another width
        elif isinstance(block, SkippedLayer | Zeros):
            experts = 0
        sizes[layer] = experts, bytes_of(module)
    return sizes


def _outcome(layer: int, operations: Sequence[Operation]) -> str:
    words = []
    for operation in operations:
        if operation.layer == layer:
            drops_layer = isinstance(operation, Drop) and operation.part == "layer"
            words.append(WORDS.get(operation.kind) or ("removed" if drops_layer else "without its MoE block"))
    return ", ".join(dict.fromkeys(words))  # several rounds may have done the same


def _ranks(layer: int, operations: Sequence[Operation]) -> tuple[int, int] | None:
    ranks = [
        rank
        for operation in operations
        if isinstance(operation, Factorize) and operation.layer == layer
        for ranks_of_experts in operation.ranks.values()
        for rank in ranks_of_experts
        if rank is not None
    ]
    return (min(ranks), max(ranks)) if ranks else None


def _widths(layer: int, operations: Sequence[Operation]) -> tuple[int, int] | None:
    narrowed = [operation for operation in operations if isinstance(operation, Narrow) and operation.layer == layer]
    return (min(narrowed[-1].widths), max(narrowed[-1].widths)) if narrowed else None
