"""What trains, and the part of a model that checkpoints keep."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from recondense.models import views
from recondense.models.blocks import CondensedMoE
from recondense.models.decoder import decoder_layers
from recondense.models.views import block_name, expert_modules, get_block, is_dense, set_block, with_parts
from recondense.operations import PROJECTIONS


def trained_modules(model: PreTrainedModel, layers: Sequence[int]) -> dict[str, nn.Module]:
    """The experts of some layers, shared and routed, by their names in the model; no router, no gate.

    Of a layer that a family's own class holds dense, as it does a condensed one, its projections.
    """
    found: dict[str, nn.Module] = {}
    for layer in layers:
        block = get_block(model, layer)
        if isinstance(block, CondensedMoE) or is_dense(block):
            parts: dict[str, nn.Module] = {name: getattr(block, name) for name in PROJECTIONS}
        else:
            parts = expert_modules(model, layer)
        found |= {f"{block_name(layer)}.{name}": part for name, part in parts.items()}
    return found


def trained_layers(model: PreTrainedModel, layers: Sequence[int]) -> list[int]:
    """Those of some layers that have experts, or were condensed; all that have experts, where none of these is left."""
    own = [layer for layer in layers if trained_modules(model, [layer])]
    blocks = {layer: get_block(model, layer) for layer in range(len(decoder_layers(model)))}
    return own or [layer for layer, block in blocks.items() if not is_dense(block) and trained_modules(model, [layer])]


def separated(model: PreTrainedModel, layer: int, original: nn.Module) -> bool:
    """Give a layer its own copies of experts that it shares with the original block, so that they can train.

    Returns:
        whether the layer shared anything.
    """
    theirs = {id(parameter) for parameter in original.parameters()}
    shared = {
        name: module
        for name, module in expert_modules(model, layer).items()
        if any(id(parameter) in theirs for parameter in module.parameters())
    }
    if shared:
        block = with_parts(get_block(model, layer))
        for name, module in shared.items():
            setattr(block, name, copy.deepcopy(module))
        set_block(model, layer, block)
    return bool(shared)


def trainable_parameters(model: PreTrainedModel, layers: Sequence[int], trainable: str) -> dict[str, nn.Parameter]:
    """What a recovery trains, by name in the model.

    Args:
        layers: "experts" trains shared and retained experts of these layers only, dense ones among them; of all MoE
            layers that are left if there are none, or if nothing is left of these (they were dropped).
        trainable: "experts" or "all"; a router's correction bias, which no gradient reaches, is in neither.

    Returns:
        name -> parameter. Routers, gates and the scales of condensed layers are never among the experts.
    """
    if trainable == "all":
        return {name: value for name, value in model.named_parameters() if not views.selects_experts(name)}
    return {
        f"{name}.{own}": parameter
        for name, module in trained_modules(model, trained_layers(model, layers)).items()
        for own, parameter in module.named_parameters()
    }
