"""Surgery does: it executes a Plan on a model and never decides. One operation, one file.

`restructure` makes the shapes from the plan alone (on the meta device too); `apply` computes the weights as well, each
operation on what the one before it left; `refit` solves weights on the calibration set, last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.files import fingerprint
from recondense.models import blocks, decoder, views
from recondense.models.layer_store import layer_store
from recondense.operations import Condense, Drop, Factorize, Merge, Operation, Prune, Refit
from recondense.plan import Plan
from recondense.surgery import condense, drop, factorize, merge, prune
from recondense.surgery.refit import refit_layers

Record = Callable[[], "Tape"]


def restructure(model: PreTrainedModel, plan: Plan) -> dict[int, nn.Module]:
    """Put blocks of the plan's shapes in place of the original ones; their weights are not to be relied on.

    Args:
        model: changed in place; may lie on the meta device.
        plan: what to do.

    Returns:
        the original blocks by decoder-layer index; a decoder layer where the plan removes all of it.

    Raises:
        UserError: an operation on a layer that is not sparse (any more), or on experts that do not exist.
    """
    originals: dict[int, nn.Module] = {}
    with _all_or_nothing(model, originals):
        for operation in structural(plan):
            _exchange(model, operation.layer, _shaped(model, operation), originals)
    decoder.without_router_loss(model)
    return originals


def apply(model: PreTrainedModel, plan: Plan, record: Record | None = None) -> dict[int, nn.Module]:
    """Execute a plan, all but its refits; several operations on one layer follow each other.

    Args:
        model: changed in place.
        plan: what to do.
        record: tapes the model on the calibration set as it is when called; factorizing with whitening needs it.

    Returns:
        the original blocks, as `restructure`: for a teacher to keep or the caller to drop.

    Raises:
        UserError: as `restructure`; an operation that needs calibration data, and no `record`.
    """
    originals: dict[int, nn.Module] = {}
    with _all_or_nothing(model, originals):
        for whitened, group in groupby(structural(plan), lambda each: getattr(each, "whitening", False)):
            operations = list(group)
            if whitened and record is None:
                raise UserError("plan: factorize with whitening needs the calibration set; none was given")
            names = _names(model, operations, layer_store(model).fingerprint() if whitened else "")
            tape = None
            if whitened and record is not None and not all(layer_store(model).is_offloaded(name) for name in names):
                tape = record()  # of the model before any of the group
            for operation, name in zip(operations, names, strict=True):
                _exchange(model, operation.layer, _made(model, operation, tape, name), originals)
    decoder.without_router_loss(model)
    return originals


def fill(model: PreTrainedModel, plan: Plan, originals: Mapping[int, nn.Module], record: Record | None = None) -> None:
    """Compute the weights of restructured blocks from the original ones; one changed block more is held at a time."""
    shaped = {layer: views.get_block(model, layer) for layer in originals}
    with views.swapped(model, originals):
        apply(model, plan, record)
        filled = {layer: views.get_block(model, layer) for layer in originals}
    for layer, block in shaped.items():
        views.set_block(model, layer, block)
        block.load_state_dict(filled.pop(layer).state_dict())


def refit(
    model: PreTrainedModel, plan: Plan, originals: Mapping[int, nn.Module], record: Record
) -> dict[int, dict[str, float]]:
    """Execute a plan's refits, layer after layer; empty if it has none.

    Args:
        originals: what `apply` returned.
        record: tapes the model on the calibration set as it is when called.

    Returns:
        error of each refitted layer's output on the calibration set before and after, relative to the original's.
    """
    wanted = [operation for operation in plan.operations if isinstance(operation, Refit)]
    return refit_layers(model, wanted, originals, record) if wanted else {}


def structural(plan: Plan) -> Iterable[Operation]:
    """The operations that change shapes, in order."""
    return (operation for operation in plan.operations if not isinstance(operation, Refit))


def _shaped(model: PreTrainedModel, operation: Operation) -> nn.Module:
    """The block that an operation makes of a layer as it is now."""
    block = _sparse_block(model, operation)
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
            return views.with_parts(block.module, experts=factorize.restructure(block, operation))
    raise AssertionError(operation)


def _made(model: PreTrainedModel, operation: Operation, tape: Tape | None, name: str) -> nn.Module:
    """The block that an operation makes; of a model larger than memory it is offloaded, and not made twice."""
    if isinstance(operation, Drop):
        return _shaped(model, operation)
    store = layer_store(model)
    found = store.load_back(name, lambda: _shaped(model, operation))
    if found is not None:
        return found
    with store.resident(operation.layer):
        return store.offload(_filled(model, operation, tape), name)


def _names(model: PreTrainedModel, operations: Sequence[Operation], context: str) -> list[str]:
    """The keys of offloaded blocks: by what stood in the layer, what is done to it, and what else decides that."""
    store = layer_store(model)
    if not store.streamed:
        return [""] * len(operations)
    standing: dict[int, Any] = {each.layer: store.layer_keys(each.layer) for each in operations}
    names = []
    for each in operations:
        said = store.context, context, standing[each.layer], Plan("", (each,)).to_dict()["operations"]
        names.append(f"layer-{each.layer:03d}-{fingerprint(*said)}")
        standing[each.layer] = names[-1]
    return names


def _filled(model: PreTrainedModel, operation: Operation, tape: Tape | None) -> nn.Module:
    """`_shaped`, with its weights."""
    before = _sparse_block(model, operation)
    after = _shaped(model, operation)
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


def _sparse_block(model: PreTrainedModel, operation: Operation) -> views.SparseBlock:
    blocks = views.sparse_blocks(model)
    if operation.layer not in blocks:
        raise UserError(
            f"plan: {operation.kind} layer {operation.layer}, but the sparse MoE layers are {sorted(blocks)}"
        )
    return blocks[operation.layer]


def _exchange(model: PreTrainedModel, layer: int, block: nn.Module, originals: dict[int, nn.Module]) -> None:
    """Put a block in place and keep what the layer had before anything was done to it."""
    if isinstance(block, blocks.SkippedLayer):
        if layer in originals:  # the decoder layer gets its own block back before it goes as a whole
            views.set_block(model, layer, originals[layer])
        originals[layer] = decoder.decoder_layers(model)[layer]
    else:
        originals.setdefault(layer, views.get_block(model, layer))
    views.set_block(model, layer, block)


@contextmanager
def _all_or_nothing(model: PreTrainedModel, originals: dict[int, nn.Module]) -> Iterator[None]:
    """A plan that turns out wrong half-way leaves the model as it was."""
    try:
        with torch.no_grad():
            yield
    except BaseException:
        for layer, block in originals.items():
            views.set_block(model, layer, block)
        raise
