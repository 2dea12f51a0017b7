"""Refit: solve for the output weights of changed layers by ridge least squares on the calibration set.

Layers are refitted one after another, on the states of the compressed model. The target of a layer is the original's
hidden state after the layer, minus the compressed model's residual before its block. So a layer also compensates for
the errors of the layers below it.

A block's output is linear in its down projections: y = Σ_u H_u W_uᵀ + rest. A unit u is an expert, with H_u its inner
activations times the routing weights, or an entire condensed layer. Normal equations are summed over text batches.

Legend: T tokens, t tokens of a unit, D hidden size, F expert width, n inputs of a unit, U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.files import fingerprint
from recondense.models import moe_blocks
from recondense.models.hooks import eval_mode
from recondense.models.layer_store import layer_store
from recondense.models.low_rank import LowRankExperts
from recondense.models.parameters import count_parameters
from recondense.models.replacement_blocks import CondensedMoE, expert_inner
from recondense.models.tensor_store import TensorList
from recondense.operations import Refit
from recondense.surgery.least_squares import Unit, solve

NORMAL_BYTES = 20  # per entry of the normal matrix: in fp64, in its factors, and in fp32 for one text batch
LEAST_COLUMNS = 1024  # this many are always solved together, however small the layer is


@torch.no_grad()
def refit_layers(
    model: PreTrainedModel,
    operations: Sequence[Refit],
    originals: Mapping[int, nn.Module],
    record: Callable[[], Tape],
    original: Callable[[], AbstractContextManager[Any]] | None = None,
) -> dict[int, dict[str, float]]:
    """Refit layers in place, from the lowest to the highest.

    The units of a layer are solved together if their normal matrix and its factors are no larger than twice the
    original layer's weights in fp32. Otherwise parts of that size are solved one after another, in several passes. This
    depends only on shapes, so the result does not depend on the available memory.

    Args:
        model: the compressed model.
        operations: the layers, and what to refit in each.
        originals: the uncompressed blocks that surgery replaced.
        record: records a tape of the model as it is at the call.
        original: returns a context in which the model is the original, if training may have changed other weights too.

    Returns:
        For each layer, ‖target − output‖_F / ‖target‖_F before and after. If the error would not become smaller, the
        layer's weights are not changed.

    Raises:
        UserError: coefficients should be refitted in a layer that is not condensed, or a layer's block was removed.
    """
    embedded = [] if original is None else [state.clone() for state in record().states[0]]
    with moe_blocks.swap_blocks(model, originals) if original is None else original():
        tape = record()
    by_layer = {operation.layer: operation for operation in operations}
    first = min([*by_layer, *originals]) if original is None else 0
    states = tape.states[first] if original is None else tape.storage.tensor_list()
    for state in embedded:
        states.append(state)
    report: dict[int, dict[str, float]] = {}
    with eval_mode(model):
        for layer in range(first, tape.num_layers):
            if layer in by_layer:
                columns = most_columns(originals.get(layer) or moe_blocks.get_block(model, layer))
                report[layer] = _refit_once(model, tape, by_layer[layer], states, columns)
            entering, states = states, tape.storage.tensor_list()
            with layer_store(model).resident(layer):
                for index, state in enumerate(entering):
                    states.append(tape.run_layer(model, layer, index, state))
    return report


def most_columns(original: nn.Module) -> int:
    """Return the maximum number of inputs of a block's units that are solved for together."""
    layer_bytes = 2 * 4 * count_parameters(original)
    return max(LEAST_COLUMNS, math.isqrt(layer_bytes // NORMAL_BYTES))


def _refit_once(
    model: PreTrainedModel, tape: Tape, operation: Refit, states: TensorList, columns: int
) -> dict[str, float]:
    """Refit a layer. For a streamed model, the refitted block is offloaded, and computed only once."""
    layer, store = operation.layer, layer_store(model)
    name = f"refit-{layer:03d}-{fingerprint(store.fingerprint(), asdict(operation))}"
    errors = store.notes(name)
    block = store.load_back(name, lambda: moe_blocks.get_block(model, layer)) if errors else None
    if block is None:
        with store.resident(layer):
            errors = _refit_layer(model, tape, operation, states, columns)
            block = store.offload(moe_blocks.get_block(model, layer), name, errors)
    moe_blocks.set_block(model, layer, block)
    return errors


def _refit_layer(
    model: PreTrainedModel, tape: Tape, operation: Refit, states: TensorList, columns: int
) -> dict[str, float]:
    layer = operation.layer
    inputs, targets = _inputs_and_targets(model, tape, layer, states)
    block = moe_blocks.get_block(model, layer)
    norm = sum(float(target_TD.double().square().sum()) for target_TD in targets) ** 0.5

    def error() -> float:
        squares = [
            (target_TD - moe_blocks.block_output(block(x_TD[None]))[0].float()).double().square().sum()
            for x_TD, target_TD in zip(inputs, targets, strict=True)
        ]
        return float(sum(squares)) ** 0.5 / max(norm, 1e-300)

    before = error()
    if operation.what == "coefficients":
        if not isinstance(block, CondensedMoE):
            raise UserError(f"plan: refit, layer {layer}: the layer is not condensed, so it has no coefficients")
        assert block.scale is not None
        weights = [block.scale]
        saved = [block.scale.clone()]
        assert operation.ridge != "auto"
        _solve_coefficients(block, inputs, targets, operation.ridge)
    else:
        units = units_of(model, layer)
        weights = [unit.weight_Dn for unit in units]
        saved = [weight.clone() for weight in weights]
        solve(block, units, inputs, targets, tape.storage.tensor_list(), operation.ridge, columns)
    after = error()
    if not after < before:
        for weight, old in zip(weights, saved, strict=True):
            weight.copy_(old)
        after = before
    return {"error_before": before, "error_after": after}


def units_of(model: PreTrainedModel, layer: int) -> list[Unit]:
    """Return the linear parts of a layer's block that a refit may change.

    Raises:
        UserError: the plan removed the block.
    """
    block = moe_blocks.get_block(model, layer)
    if isinstance(block, CondensedMoE):
        return [_condensed_unit(block)]
    if not moe_blocks.is_sparse(block):
        raise UserError(f"plan: refit, layer {layer}: the plan removes its block")
    view = moe_blocks.sparse_view(model, layer, block)
    return [_expert_unit(view, expert) for expert in range(view.num_experts)]


def _condensed_unit(block: CondensedMoE) -> Unit:
    def features(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        with _record_input(block.down_proj) as inner:
            block(x_TD)
        return torch.arange(len(x_TD), device=x_TD.device), inner[0].float()

    return Unit(block.down_proj.weight, features)


def _expert_unit(view: moe_blocks.SparseBlock, expert: int) -> Unit:
    experts = view.experts
    if isinstance(experts, LowRankExperts):
        bucket, position = experts.place_of(expert)
        weight, right = bucket.down_left[position], None if bucket.down_right is None else bucket.down_right[position]
    else:
        weight, right = view.fused_weights.down_EDF[expert], None

    def features(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        _, weights_TK, index_TK = view.router(x_TD)
        selected_TK = index_TK == expert
        rows = selected_TK.any(dim=1).nonzero().flatten()
        weight_t1 = (weights_TK * selected_TK).sum(dim=1)[rows, None].float()
        inner_tF = _inner(view, expert, x_TD[rows])
        return rows, weight_t1 * (inner_tF if right is None else inner_tF @ right.T).float()

    return Unit(weight, features)


def _inner(view: moe_blocks.SparseBlock, expert: int, x_tD: Tensor) -> Tensor:
    """Compute the input of one expert's down projection."""
    experts = view.experts
    if not isinstance(experts, LowRankExperts):
        return expert_inner(x_tD, view.fused_weights, expert)
    bucket, position = experts.place_of(expert)
    return bucket.inner(x_tD, position, experts.glu)


def _solve_coefficients(block: CondensedMoE, inputs: TensorList, targets: TensorList, ridge: float) -> None:
    """Solve for the scale of the shared part and of each retained expert by least squares."""
    assert block.scale is not None
    # Adjacent rows with the same scale are one part. The solution is a factor for a part's scale.
    bounds = [0, *((block.scale[1:] != block.scale[:-1]).nonzero().flatten() + 1).tolist(), len(block.scale)]
    if block.shared_width and block.shared_width not in bounds:
        bounds = sorted({*bounds, block.shared_width})
    parts = [slice(start, end) for start, end in pairwise(bounds) if end > start]
    unit = _condensed_unit(block)
    gram = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    right = torch.zeros(len(parts), dtype=torch.float64)
    for x_TD, target_TD in zip(inputs, targets, strict=True):
        _, inner_TW = unit.features(x_TD)
        outputs = [inner_TW[:, part] @ block.down_proj.weight[:, part].float().T for part in parts]
        stacked = torch.stack([output.flatten() for output in outputs])
        bias = block.down_proj.bias
        residual = (target_TD - sum(outputs) - (0 if bias is None else bias.float())).flatten()
        gram += (stacked @ stacked.T).double().cpu()
        right += (stacked @ residual).double().cpu()
    gram.diagonal().add_(ridge * float(gram.diagonal().mean()) + 1e-30)
    for part, change in zip(parts, torch.linalg.solve(gram, right).tolist(), strict=True):
        block.scale[part] *= 1 + change


def _inputs_and_targets(
    model: PreTrainedModel, tape: Tape, layer: int, states: TensorList
) -> tuple[TensorList, TensorList]:
    """Return the inputs of the layer's block in the compressed model and the targets of its output, both (T, D)."""
    block = moe_blocks.get_block(model, layer)
    inputs, targets = tape.storage.tensor_list(), tape.storage.tensor_list()
    for index, state in enumerate(states):
        with _record_input(block) as entering, _record_output(block) as outputs:
            leaving_BSD = tape.run_layer(model, layer, index, state)
        inputs.append(tape.real_tokens(index, entering[0]))
        residual_TD = tape.real_tokens(index, leaving_BSD).float() - tape.real_tokens(index, outputs[0]).float()
        targets.append(tape.real_tokens(index, tape.states[layer + 1][index]).float() - residual_TD)
    return inputs, targets


@contextmanager
def _record_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Record the inputs of a module in the forward passes inside the context."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


@contextmanager
def _record_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Record the outputs of a module in the forward passes inside the context."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, output: outputs.append(moe_blocks.block_output(output)))
    try:
        yield outputs
    finally:
        handle.remove()
