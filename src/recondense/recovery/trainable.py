"""Which parameters a recovery trains."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from recondense.config.schema import RecoveryConfig
from recondense.errors import UserError
from recondense.models import views
from recondense.models.decoder import decoder_layers
from recondense.models.replacement_blocks import CondensedMoE
from recondense.models.views import block_name, expert_modules, get_block, is_dense
from recondense.operations import PROJECTIONS
from recondense.surgery.student import Student


def trainable_modules(model: PreTrainedModel, layers: Sequence[int]) -> dict[str, nn.Module]:
    """The routed and shared experts of some layers by their names in the model; no router, no gate.

    A condensed layer, and a dense layer of the family's own class, has its projections in their place.
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
    """Layers among `layers` with trainable experts. If there is none, all layers with experts."""
    named = [layer for layer in layers if trainable_modules(model, [layer])]
    blocks = {layer: get_block(model, layer) for layer in range(len(decoder_layers(model)))}
    return named or [
        layer for layer, block in blocks.items() if not is_dense(block) and trainable_modules(model, [layer])
    ]


def trainable_parameters(model: PreTrainedModel, layers: Sequence[int], trainable: str) -> dict[str, nn.Parameter]:
    """The parameters that a recovery trains, by name in the model.

    Args:
        layers: "experts" trains shared and retained experts of these layers, dense layers included. If there is none,
            or if all of them were dropped, it trains those of all MoE layers.
        trainable: "experts" or "all". Neither contains a router's correction bias, which no gradient reaches.

    Returns:
        Parameters by name. Routers, gates and the scales of condensed layers are never among the experts.
    """
    if trainable == "all":
        return {name: value for name, value in model.named_parameters() if not views.selects_experts(name)}
    return {
        f"{name}.{inner}": parameter
        for name, module in trainable_modules(model, trainable_layers(model, layers)).items()
        for inner, parameter in module.named_parameters()
    }


def check_trainable(student: Student, layers: Sequence[int], settings: RecoveryConfig) -> None:
    """Refuse a recovery that has nothing to train, or would change the original with the student.

    Args:
        layers: whose experts are to train.

    Raises:
        UserError: saying which.
    """
    if settings.trainable == "all" and student.plan.operations:
        raise UserError(
            "recovery.trainable=all: the original shares the backbone and would change with the student; use "
            "recovery.trainable=experts"
        )
    if settings.needs_experts and not trainable_parameters(student.model, layers, "experts"):
        raise UserError(
            "recovery: no experts are left to train, all MoE layers were removed; use recovery=none or remove less"
        )
