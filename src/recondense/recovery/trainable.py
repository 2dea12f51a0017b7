"""Select the parameters that a recovery trains."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn
from transformers import PreTrainedModel

from recondense.config.schema import RecoveryConfig
from recondense.errors import UserError
from recondense.models import moe_blocks
from recondense.models.decoder import attention_parameters, decoder_layers, final_norm, norm_parameters
from recondense.models.moe_blocks import block_name, expert_modules, get_block, is_dense, router_modules
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


def layer_parameters(model: PreTrainedModel, layer: int, parts: Collection[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of some parts of a decoder layer, by name in the model.

    Args:
        model: the causal LM.
        layer: the decoder layer.
        parts: "experts": the routed and shared experts; in condensed and dense layers, the projections. "routers": the
            router with any bias, and the gate of the shared experts. "norms": all norms, those in the attention too.
            "attention": the rest of the attention. Other words have no parameters.

    Returns:
        The parameters. A router's correction bias is never included, because it gets no gradient.
    """
    modules: dict[str, nn.Module] = trainable_modules(model, [layer]) if "experts" in parts else {}
    if "routers" in parts:
        modules |= {f"{block_name(layer)}.{name}": module for name, module in router_modules(model, layer).items()}
    named = {f"{name}.{inner}": value for name, part in modules.items() for inner, value in part.named_parameters()}
    if "norms" in parts:
        named |= norm_parameters(model, layer)
    if "attention" in parts:
        named |= attention_parameters(model, layer)
    return {name: value for name, value in named.items() if not moe_blocks.selects_experts(name)}


def trainable_parameters(
    model: PreTrainedModel, layers: Sequence[int], trainable: str | Collection[str], router_layers: str = "changed"
) -> dict[str, nn.Parameter]:
    """Return the parameters that a recovery trains, by name in the model.

    Args:
        model: the causal LM.
        layers: the layers for "experts" and "routers". If none of them has experts, the experts of all MoE layers are
            used.
        trainable: the parts: "experts", "routers", "norms", "attention" (see `layer_parameters`) or "all". Norms and
            attention are those of all layers; the final norm is one of the norms. "lora" has no parameters here.
        router_layers: "changed" for the routers of `layers`, or "all" for those of all sparse layers.
    """
    parts = {trainable} if isinstance(trainable, str) else set(trainable)
    if "all" in parts:
        return {name: value for name, value in model.named_parameters() if not moe_blocks.selects_experts(name)}
    every = range(len(decoder_layers(model)))
    changed = trainable_layers(model, layers) if "experts" in parts else layers
    where: dict[str, Collection[int]] = {
        "experts": changed,
        "routers": changed if router_layers == "changed" else every,
        "norms": every,
        "attention": every,
    }
    named: dict[str, nn.Parameter] = {}
    for layer in every:
        named |= layer_parameters(model, layer, [part for part in where if part in parts and layer in where[part]])
    if "norms" in parts:
        named |= {f"model.norm.{name}": value for name, value in final_norm(model).named_parameters()}
    return named


def trains_nothing(model: PreTrainedModel, layers: Sequence[int], settings: RecoveryConfig) -> bool:
    """Return whether a model has none of the parts that a recovery trains.

    Args:
        model: the causal LM, which may be on the meta device.
        layers: the layers whose experts and routers should be trained.
        settings: the settings of the recovery.
    """
    if "lora" in settings.parts and (settings.lora.target != "experts" or trainable_layers(model, layers)):
        return False
    return not trainable_parameters(model, layers, settings.parts, settings.router_layers)


def check_trainable(student: Student, layers: Sequence[int], settings: RecoveryConfig) -> None:
    """Check that a recovery has something to train.

    Args:
        student: the student.
        layers: the layers whose experts and routers should be trained.
        settings: the settings of the recovery.

    Raises:
        UserError: there is nothing to train.
    """
    if not trains_nothing(student.model, layers, settings):
        return
    if settings.parts == ("routers",) and settings.router_layers == "changed":
        why = f"{WITHOUT_ROUTERS}; use recovery.trainable=experts" if settings.objective == "local" else NO_ROUTERS
        raise UserError(f"recovery.trainable=routers: {why}")
    raise UserError(
        f"recovery: there are no {words(settings)} to train, because all MoE layers were removed; use recovery=none, "
        "or remove less"
    )


def words(settings: RecoveryConfig) -> str:
    """Return the parts that a recovery trains, in words."""
    return " or ".join("experts" if part == "lora" else part for part in settings.parts)


WITHOUT_ROUTERS = "no layer that the plan changes has a router afterward"
NO_ROUTERS = (
    f"{WITHOUT_ROUTERS}; use recovery.router_layers=all to train the routers of the other layers, or "
    "recovery.trainable=experts"
)
