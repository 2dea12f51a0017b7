"""Surgery executes a Plan on a model and never decides. One operation, one file.

`restructure` makes the shapes from the plan alone, on the meta device too. `execute` computes the weights as well; each
operation works on what the one before it left. `refit` solves weights on the calibration set, last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.files import fingerprint
from recondense.models import decoder, replacement_blocks, views
from recondense.models.layer_store import layer_store
from recondense.operations import Condense, Drop, Factorize, Merge, Operation, Prune, Refit
from recondense.plan import Plan
from recondense.surgery import condense, drop, factorize, merge, prune
from recondense.surgery.refit import refit_layers

Record = Callable[[], "Tape"]


def restructure(model: PreTrainedModel, plan: Plan) -> dict[int, nn.Module]:
    """Put blocks of the plan's shapes in place of the original ones. Their weights mean nothing.

    Args:
        model: changed in place; may lie on the meta device.
        plan: the operations.

    Returns:
        The original blocks by decoder-layer index; a decoder layer where the plan removes all of it.

    Raises:
        UserError: an operation on a layer that is not sparse (any more), or on experts that do not exist.
    """
    originals: dict[int, nn.Module] = {}
    with _restore_on_error(model, originals):
        for operation in structural_operations(plan):
            _exchange(model, operation.layer, _shape_block(model, operation), originals)
    decoder.disable_router_loss(model)
    return originals


def execute(model: PreTrainedModel, plan: Plan, record: Record | None = None) -> dict[int, nn.Module]:
    """Execute a plan, all but its refits. Several operations on one layer follow each other.

    Args:
        model: changed in place.
        plan: the operations.
        record: tapes the model on the calibration set as it is when called; factorizing with whitening needs it.

    Returns:
        The original blocks, as `restructure`.

    Raises:
        UserError: as `restructure`; an operation that needs calibration data, and no `record`.
    """
    originals: dict[int, nn.Module] = {}
    with _restore_on_error(model, originals):
        for whitened, group in groupby(structural_operations(plan), _needs_tape):
            operations = list(group)
            if whitened and record is None:
                raise UserError("plan: factorize with whitening needs the calibration set; none was given")
            names = _block_names(model, operations, layer_store(model).fingerprint() if whitened else "")
            tape = None
            if whitened and record is not None and not all(layer_store(model).is_offloaded(name) for name in names):
                tape = record()  # of the model before any of the group
            for operation, name in zip(operations, names, strict=True):
                _exchange(model, operation.layer, _make_block(model, operation, tape, name), originals)
    decoder.disable_router_loss(model)
    return originals


def refit(
    model: PreTrainedModel, plan: Plan, originals: Mapping[int, nn.Module], record: Record
) -> dict[int, dict[str, float]]:
    """Execute a plan's refits, layer after layer.

    Args:
        originals: what `execute` returned.
        record: tapes the model on the calibration set as it is when called.

    Returns:
        By layer, the error of its output on the calibration set before and after, relative to the original's. Empty if
        the plan has no refit.
    """
    operations = [operation for operation in plan.operations if isinstance(operation, Refit)]
    return refit_layers(model, operations, originals, record) if operations else {}


def structural_operations(plan: Plan) -> list[Operation]:
    """The operations that change shapes, in order."""
    return [operation for operation in plan.operations if not isinstance(operation, Refit)]


def _needs_tape(operation: Operation) -> bool:
    return isinstance(operation, Factorize) and operation.whitening


def _shape_block(model: PreTrainedModel, operation: Operation) -> nn.Module:
    """The block that an operation makes of a layer as it is now, with weights that mean nothing."""
    block = _require_sparse(model, operation)
    match operation:
        case Condense():
            return condense.restructure(block, operation)
        case Prune():
            return prune.restructure(block, operation)
        case Merge():
            return merge.restructure(block, operation)
        case Drop():
            return drop.restructure(model, operation)
        case Factorize():
            return views.replace_parts(block.module, experts=factorize.restructure(block, operation))
    raise AssertionError(operation)


def _make_block(model: PreTrainedModel, operation: Operation, tape: Tape | None, name: str) -> nn.Module:
    """The block that an operation makes, with its weights. A streamed model's is offloaded, and made only once."""
    if isinstance(operation, Drop):
        return _shape_block(model, operation)
    store = layer_store(model)
    offloaded = store.load_back(name, lambda: _shape_block(model, operation))
    if offloaded is not None:
        return offloaded
    with store.resident(operation.layer):
        return store.offload(_compute_block(model, operation, tape), name)


def _block_names(model: PreTrainedModel, operations: Sequence[Operation], context: str) -> list[str]:
    """Keys under which blocks are offloaded: from the layer's block before, the operation, and the context."""
    store = layer_store(model)
    if not store.streamed:
        return [""] * len(operations)
    before: dict[int, Any] = {operation.layer: store.layer_keys(operation.layer) for operation in operations}
    names = []
    for operation in operations:
        layer, description = operation.layer, Plan("", (operation,)).to_dict()["operations"]
        key = fingerprint(store.context, context, before[layer], description)
        before[layer] = f"layer-{layer:03d}-{key}"
        names.append(before[layer])
    return names


def _compute_block(model: PreTrainedModel, operation: Operation, tape: Tape | None) -> nn.Module:
    """`_shape_block`, with its weights."""
    before = _require_sparse(model, operation)
    after = _shape_block(model, operation)
    if isinstance(operation, Condense):
        condense.fill(after, before, operation)
    elif isinstance(operation, Merge):
        merge.fill(views.sparse_view(model, operation.layer, after), before, operation)
    elif isinstance(operation, Factorize):
        moments = None
        if operation.whitening:
            assert tape is not None
            moments = factorize.second_moments(before, tape.trace(model, operation.layer))
        factorize.fill(views.sparse_view(model, operation.layer, after).experts, before, moments)  # type: ignore[arg-type]
    return after


def _require_sparse(model: PreTrainedModel, operation: Operation) -> views.SparseBlock:
    blocks = views.sparse_blocks(model)
    if operation.layer not in blocks:
        raise UserError(
            f"plan: {operation.kind} layer {operation.layer}, but the sparse MoE layers are {sorted(blocks)}"
        )
    return blocks[operation.layer]


def _exchange(model: PreTrainedModel, layer: int, block: nn.Module, originals: dict[int, nn.Module]) -> None:
    """Put a block in place, and keep the layer's block from before any operation."""
    if isinstance(block, replacement_blocks.SkippedLayer):
        if layer in originals:  # the decoder layer gets its own block back before it goes as a whole
            views.set_block(model, layer, originals[layer])
        originals[layer] = decoder.decoder_layers(model)[layer]
    else:
        originals.setdefault(layer, views.get_block(model, layer))
    views.set_block(model, layer, block)


@contextmanager
def _restore_on_error(model: PreTrainedModel, originals: dict[int, nn.Module]) -> Iterator[None]:
    """A plan that turns out wrong half-way leaves the model as it was."""
    try:
        with torch.no_grad():
            yield
    except BaseException:
        for layer, block in originals.items():
            views.set_block(model, layer, block)
        raise
