"""Surgery executes a Plan on a model and makes no decisions. Each operation is in its own file.

`restructure` changes only the shapes; it needs no weights and also works on the meta device. `execute` also computes
the weights; each operation works on the result of the one before it. `refit` comes last and solves for weights on the
calibration set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.files import fingerprint
from recondense.models import decoder, moe_blocks, removed_blocks
from recondense.models.layer_store import layer_store
from recondense.operations import Condense, Constant, Drop, Factorize, Merge, Narrow, Operation, Prune, Refit
from recondense.plan import Plan
from recondense.surgery import condense, constant, drop, factorize, merge, narrow, prune
from recondense.surgery.refit import refit_layers

RecordTape = Callable[[], Tape]
NEEDS_TAPE = {"constant": "constant", "narrow": "narrow with compensate", "factorize": "factorize with whitening"}


def restructure(model: PreTrainedModel, plan: Plan) -> dict[int, nn.Module]:
    """Replace the original blocks by blocks of the plan's shapes, with undefined weights.

    Args:
        model: the model; it is changed in place, and may be on the meta device.
        plan: the operations.

    Returns:
        The original blocks by decoder-layer index. If the plan removes an entire decoder layer, that layer.

    Raises:
        UserError: an operation names a layer that is not (or no longer) sparse, or experts that do not exist.
    """
    originals: dict[int, nn.Module] = {}
    with restore_on_error(model, originals), torch.no_grad():
        for operation in structural_operations(plan):
            _exchange(model, operation.layer, _shape_block(model, operation), originals)
    decoder.disable_router_loss(model)
    return originals


def execute(model: PreTrainedModel, plan: Plan, record: RecordTape | None = None) -> dict[int, nn.Module]:
    """Execute a plan except its refits. Several operations on the same layer are executed in order.

    Args:
        model: the model; it is changed in place.
        plan: the operations.
        record: records a tape of the model on the calibration set, with the model as it is at the call. Factorizing
            with whitening, narrowing with compensation and constants need it, one tape for each step.

    Returns:
        The original blocks, as for `restructure`.

    Raises:
        UserError: an operation does not fit the model, see `restructure`; or it needs calibration data, and `record` is
            None.
    """
    originals: dict[int, nn.Module] = {}
    with restore_on_error(model, originals):
        _execute(model, plan, record, originals)
    return originals


def execute_further(
    model: PreTrainedModel, plan: Plan, record: RecordTape | None, originals: Mapping[int, nn.Module]
) -> dict[int, nn.Module]:
    """Execute a plan on a model that has been compressed before, see `execute`.

    Args:
        model, plan, record: as for `execute`. The plan's experts are those of the model as it is.
        originals: the original blocks and decoder layers that were replaced before.

    Returns:
        All original blocks and decoder layers that have been replaced so far.
    """
    replaced = dict(originals)
    layers = decoder.decoder_layers(model)
    before = {
        layer: (layers[layer], moe_blocks.get_block(model, layer)) for layer in plan.layers if layer < len(layers)
    }
    try:
        _execute(model, plan, record, replaced)
    except BaseException:
        for layer, (decoder_layer, block) in before.items():
            moe_blocks.set_block(model, layer, decoder_layer)
            if not isinstance(decoder_layer, removed_blocks.SkippedLayer):
                moe_blocks.set_block(model, layer, block)
        raise
    return replaced


@torch.no_grad()
def _execute(model: PreTrainedModel, plan: Plan, record: RecordTape | None, originals: dict[int, nn.Module]) -> None:
    """Execute a plan, and add the blocks that it replaces to `originals`, unless there are earlier ones."""
    for operations in _groups(structural_operations(plan)):
        needs_tape = _needs_tape(operations[0])
        if needs_tape and record is None:
            raise UserError(f"plan: {NEEDS_TAPE[operations[0].kind]} needs the calibration set, but there is no tape")
        names = _block_names(model, operations, layer_store(model).fingerprint() if needs_tape else "")
        tape = None
        if needs_tape and record is not None and not all(layer_store(model).is_offloaded(name) for name in names):
            tape = record()  # before any operation of this group
        for operation, name in zip(operations, names, strict=True):
            _exchange(model, operation.layer, _make_block(model, operation, tape, name), originals)
    decoder.disable_router_loss(model)


def refit(
    model: PreTrainedModel,
    plan: Plan,
    originals: Mapping[int, nn.Module],
    record: RecordTape,
    original: Callable[[], AbstractContextManager[Any]] | None = None,
) -> dict[int, dict[str, float]]:
    """Execute a plan's refits, one layer after another.

    Args:
        model: the compressed model; it is changed in place.
        plan: the operations.
        originals: the return value of `execute`.
        record: records a tape of the model on the calibration set, with the model as it is at the call.
        original: returns a context in which the model is the original, if they differ in more than `originals`.

    Returns:
        For each refitted layer, the relative errors of its output before and after, see `refit_layers`. Empty if the
        plan has no refit.
    """
    operations = [operation for operation in plan.operations if isinstance(operation, Refit)]
    for operation in operations:
        if operation.layer not in originals:  # its weights are the original's own
            raise UserError(f"plan: refit layer {operation.layer}, but nothing else in the plan changes this layer")
    return refit_layers(model, operations, originals, record, original) if operations else {}


def structural_operations(plan: Plan) -> list[Operation]:
    """Return the operations that change shapes, in order."""
    return [operation for operation in plan.operations if not isinstance(operation, Refit)]


def _groups(operations: Sequence[Operation]) -> list[list[Operation]]:
    """Group consecutive operations that use one tape, or none.

    Operations of different kinds, or two of the same layer, are of different steps: the search of the later step has
    seen the model after the earlier operations, and so must its tape.
    """
    groups: list[list[Operation]] = []
    for operation in operations:
        group = groups[-1] if groups else []
        if _needs_tape(operation):
            joins = all(_needs_tape(o) and o.kind == operation.kind and o.layer != operation.layer for o in group)
        else:
            joins = not any(map(_needs_tape, group))
        if group and joins:
            group.append(operation)
        else:
            groups.append([operation])
    return groups


def _needs_tape(operation: Operation) -> bool:
    match operation:
        case Narrow():
            return operation.compensate
        case Factorize():
            return operation.whitening
    return isinstance(operation, Constant)


def _shape_block(model: PreTrainedModel, operation: Operation) -> nn.Module:
    """Make the block that results from an operation on the current block of a layer, with undefined weights."""
    block = _require_sparse(model, operation)
    match operation:
        case Condense():
            return condense.restructure(block, operation)
        case Prune():
            return prune.restructure(block, operation)
        case Constant():
            return constant.restructure(block, operation)
        case Narrow():
            return narrow.restructure(block, operation)
        case Merge():
            return merge.restructure(block, operation)
        case Drop():
            return drop.restructure(model, operation)
        case Factorize():
            return moe_blocks.replace_parts(block.module, experts=factorize.restructure(block, operation))
    raise AssertionError(operation)


def _make_block(model: PreTrainedModel, operation: Operation, tape: Tape | None, name: str) -> nn.Module:
    """Make the block that results from an operation. For a streamed model, it is offloaded, and computed only once."""
    if isinstance(operation, Drop):
        return _shape_block(model, operation)
    store = layer_store(model)
    offloaded = store.load_back(name, lambda: _shape_block(model, operation))
    if offloaded is not None:
        return offloaded
    with store.resident(operation.layer):
        return store.offload(_compute_block(model, operation, tape), name)


def _block_names(model: PreTrainedModel, operations: Sequence[Operation], context: str) -> list[str]:
    """Return the keys of offloaded blocks, made from the layer's previous block, the operation and the context."""
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
    """Make the block of `_shape_block` and compute its weights."""
    before = _require_sparse(model, operation)
    if isinstance(operation, Narrow):
        return narrow.restructure(before, operation, None if tape is None else tape.trace(model, operation.layer))
    after = _shape_block(model, operation)
    if isinstance(operation, Condense):
        condense.fill(after, before, operation)
    elif isinstance(operation, Merge):
        merge.fill(moe_blocks.sparse_view(model, operation.layer, after), before, operation)
    elif isinstance(operation, Constant):
        assert tape is not None
        constant.fill(after, before, operation, tape.trace(model, operation.layer))
    elif isinstance(operation, Factorize):
        moments = None
        if operation.whitening:
            assert tape is not None
            moments = factorize.second_moments(before, tape.trace(model, operation.layer))
        factorize.fill(moe_blocks.sparse_view(model, operation.layer, after).experts, before, moments)  # type: ignore[arg-type]
    return after


def _require_sparse(model: PreTrainedModel, operation: Operation) -> moe_blocks.SparseBlock:
    blocks = moe_blocks.sparse_blocks(model)
    if operation.layer not in blocks:
        raise UserError(f"plan: {operation.kind}, layer {operation.layer}: the sparse MoE layers are {sorted(blocks)}")
    return blocks[operation.layer]


def _exchange(model: PreTrainedModel, layer: int, block: nn.Module, originals: dict[int, nn.Module]) -> None:
    """Set the block of a layer, and remember the layer's original block."""
    if isinstance(block, removed_blocks.SkippedLayer):
        if layer in originals:  # the decoder layer gets its original block back before it is removed
            moe_blocks.set_block(model, layer, originals[layer])
        originals[layer] = decoder.decoder_layers(model)[layer]
    else:
        originals.setdefault(layer, moe_blocks.get_block(model, layer))
    moe_blocks.set_block(model, layer, block)


def restore(model: PreTrainedModel, originals: Sequence[Mapping[int, nn.Module]]) -> None:
    """Undo several executions in reverse order, because a later one may remove a layer that an earlier one changed.

    Args:
        model: the model.
        originals: the return values of `execute` or `restructure`, in order.
    """
    for replaced in reversed(originals):
        for layer, block in replaced.items():
            moe_blocks.set_block(model, layer, block)


@contextmanager
def restore_on_error(model: PreTrainedModel, originals: Mapping[int, nn.Module]) -> Iterator[None]:
    """Restore the original blocks if an error occurs inside the context."""
    try:
        yield
    except BaseException:
        for layer, block in originals.items():
            moe_blocks.set_block(model, layer, block)
        raise
