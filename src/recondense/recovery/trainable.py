"""Select the parameters that a recovery trains."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from recondense.config.schema import RecoveryConfig
from recondense.errors import UserError
from recondense.models import moe_blocks
from recondense.models.decoder import decoder_layers
from recondense.models.moe_blocks import block_name, expert_modules, get_block, is_dense
from recondense.models.replacement_blocks import CondensedMoE
from recondense.operations import PROJECTIONS
from recondense.surgery.student import Student


def trainable_modules(model: PreTrainedModel, layers: Sequence[int]) -> dict[str, nn.Module]:
    """Return the routed and shared experts of some layers by their names in the model, without routers and gates.

    For a condensed layer, or a dense layer of the family, return its projections.
    """
    modules: dict[str, nn.Module] = {}
    for layer in layers:
        block = get_block(model, layer)
        if isinstance(block, CondensedMoE) or is_dense(block):
            parts: dict[str, nn.Module] = {name: getattr(block, name) for name in PROJECTIONS}
        else:
            parts = expert_modules(model, layer)
        modules |= {f"{block_name(layer)}.{name}": part for name, part in parts.items()}
    return modules


def trainable_layers(model: PreTrainedModel, layers: Sequence[int]) -> list[int]:
    """Return those of `layers` that have trainable experts. If there are none, return all layers with experts."""
    named = [layer for layer in layers if trainable_modules(model, [layer])]
    blocks = {layer: get_block(model, layer) for layer in range(len(decoder_layers(model)))}
    return named or [
        layer for layer, block in blocks.items() if not is_dense(block) and trainable_modules(model, [layer])
    ]


def trainable_parameters(model: PreTrainedModel, layers: Sequence[int], trainable: str) -> dict[str, nn.Parameter]:
    """Return the parameters that a recovery trains, by name in the model.

    Args:
        model: the causal LM.
        layers: the layers for "experts". If none of them has experts, all MoE layers are used.
        trainable: "experts" for the shared and retained experts of the layers, including dense layers, or "all". A
            router's correction bias is never included, because it gets no gradient.

    Returns:
        Parameters by name. Routers, gates and the scales of condensed layers do not count as experts.
    """
    if trainable == "all":
        return {name: value for name, value in model.named_parameters() if not moe_blocks.selects_experts(name)}
    return {
        f"{name}.{inner}": parameter
        for name, module in trainable_modules(model, trainable_layers(model, layers)).items()
        for inner, parameter in module.named_parameters()
    }


def check_trainable(student: Student, layers: Sequence[int], settings: RecoveryConfig) -> None:
    """Check that a recovery has something to train and does not change the original.

    Args:
        student: the student.
        layers: the layers whose experts should be trained.
        settings: the settings of the recovery.

    Raises:
        UserError: there is nothing to train, or the original would change with the student.
    """
    if settings.trainable == "all" and student.plan.operations:
        raise UserError(
            "recovery.trainable=all: the original shares the backbone and would change with the student; use "
            "recovery.trainable=experts"
        )
    if settings.needs_experts and not trainable_parameters(student.model, layers, "experts"):
        raise UserError(
            "recovery: there are no experts to train, because all MoE layers were removed; use recovery=none, or "
            "remove less"
        )
