"""The table of families: what their configs say of MoE layers, before any weight is loaded.

A family is a model_type of transformers whose experts are fused and whose blocks' output is added to the residual
stream as it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from transformers import PretrainedConfig

from recondense.errors import UserError
from recondense.models.compressed_classes import PREFIX
from recondense.models.layer_patterns import EVERY, FREQUENCY, INTERVAL, MLP_ONLY, PREFIXED, TYPES, Pattern
from recondense.models.routing import (
    Routing,
    min_experts,
    read_deepseek,
    read_deepseek_v2,
    read_deepseek_v3,
    read_ernie,
    read_normalized,
    read_plain,
)


@dataclass(frozen=True)
class Facts:
    """The MoE layers of a model, as its config describes them.

    Args:
        moe_layers: decoder-layer indices of the sparse layers, ascending.
        num_experts: routed experts of a sparse layer; the smallest number if the layers of a compressed model differ.
        expert_width: F, rows of one routed expert.
        shared_width: rows of all shared experts together, 0 without any.
        shared_gate: whether the shared experts have a gate per token.
        factorized: the sparse layers whose experts are low-rank already.
    """

    model_type: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    shared_width: int
    shared_gate: bool
    num_groups: int = 1
    top_groups: int = 1
    factorized: tuple[int, ...] = ()

    @property
    def min_experts(self) -> int:
        """The fewest experts that a layer can route among."""
        return min_experts(self.top_k, self.num_groups, self.top_groups)


@dataclass(frozen=True)
class Family:
    """The names of one model_type, and what differs between families.

    Args:
        num_experts: the config's name for the number of routed experts.
        pattern: which layers are sparse.
        routing: how the router makes weights.
        expert_width: the config's name for F.
        shared_width: rows of all shared experts together.
        shared_expert: the sparse block's attribute with the shared experts.
        shared_expert_gate: its attribute with their gate.
        router_entries: tensors of the router with an entry for each expert.
        expert_entries: tensors of the experts module with an entry for each expert.
        carried: the model class is recondense's own, so that even stock exports carry a modeling file.
        needs_packed_masks: transformers 5.23 makes the attention masks without the positions, so packed examples would
            attend to each other; the model takes one mask for each attention type instead.
        needs_sparse: the class of vLLM 0.32 loads no model without MoE layers; that of transformers does.
    """

    num_experts: str
    pattern: Pattern
    routing: Callable[[PretrainedConfig], Routing]
    expert_width: str = "moe_intermediate_size"
    shared_width: Callable[[PretrainedConfig], int] = lambda config: 0
    shared_expert: str | None = None
    shared_expert_gate: str | None = None
    router_entries: tuple[str, ...] = ("weight",)
    expert_entries: tuple[str, ...] = ("gate_up_proj", "down_proj")
    carried: bool = False
    needs_packed_masks: bool = False
    needs_sparse: bool = False


def _shared(config: PretrainedConfig) -> int:
    return config.moe_intermediate_size * (config.n_shared_experts or 0)


_V3 = Family(
    "n_routed_experts",
    PREFIXED,
    read_deepseek_v3,
    shared_width=_shared,
    shared_expert="shared_experts",
    router_entries=("weight", "e_score_correction_bias"),
)

FAMILIES: dict[str, Family] = {
    "qwen2_moe": Family(
        "num_experts",
        MLP_ONLY,
        read_plain,
        shared_width=lambda config: config.shared_expert_intermediate_size,
        shared_expert="shared_expert",
        shared_expert_gate="shared_expert_gate",
    ),
    "qwen3_moe": Family("num_experts", MLP_ONLY, read_plain, needs_sparse=True),
    "deepseek": Family(
        "n_routed_experts", FREQUENCY, read_deepseek, shared_width=_shared, shared_expert="shared_experts", carried=True
    ),
    "deepseek_v2": Family(
        "n_routed_experts", PREFIXED, read_deepseek_v2, shared_width=_shared, shared_expert="shared_experts"
    ),
    "deepseek_v3": _V3,
    "mixtral": Family("num_local_experts", EVERY, read_normalized, expert_width="intermediate_size"),
    "olmoe": Family("num_experts", EVERY, read_plain, expert_width="intermediate_size"),
    "gpt_oss": Family(
        "num_local_experts",
        EVERY,
        read_normalized,
        expert_width="intermediate_size",
        router_entries=("weight", "bias"),
        expert_entries=("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
        needs_packed_masks=True,
    ),
    "glm4_moe": replace(_V3, needs_sparse=True),
    "ernie4_5_moe": Family(
        "moe_num_experts",
        INTERVAL,
        read_ernie,
        shared_width=lambda config: config.moe_intermediate_size * (config.moe_num_shared_experts or 0),
        shared_expert="shared_experts",
        router_entries=("weight", "moe_statics.e_score_correction_bias"),
    ),
    # Families that only combine what is above.
    "dots1": _V3,
    "solar_open": replace(_V3, pattern=EVERY),
    "glm4_moe_lite": replace(_V3, pattern=TYPES, needs_sparse=True),
    "mellum": Family("num_experts", TYPES, read_plain),
}

# Config entries that are lists with one value for each decoder layer. The length alone does not tell: eos_token_id may
# be as long by chance.
PER_LAYER = ("layer_types", "mlp_layer_types")
BIASED = ("mlp_bias", "use_bias")  # config entries for biases of shared experts and dense layers: not supported


def family_name(model_type: object) -> str:
    """The family of a model_type, compressed or not.

    Raises:
        UserError: a model_type that is not supported.
    """
    name = str(model_type).removeprefix(PREFIX)
    if name not in FAMILIES:
        close = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"model_type {model_type!r} is not supported{hint}; supported: {', '.join(sorted(FAMILIES))}")
    return name


def family_of(config: PretrainedConfig) -> Family:
    """The family of a config.

    Raises:
        UserError: a model_type that is not supported.
    """
    return FAMILIES[family_name(config.model_type)]


def compressed_layers(config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """The shapes of compressed layers, by decoder-layer index; empty for a family's own config."""
    return {int(layer): shape for layer, shape in (getattr(config, "compressed_layers", None) or {}).items()}


def original_facts(config: PretrainedConfig) -> Facts:
    """Facts of the family's own model, without `compressed_layers`; it may have no MoE layers.

    Raises:
        UserError: an unsupported model_type, or biases in the shared experts.
    """
    family = family_of(config)
    biased = [name for name in BIASED if getattr(config, name, False)]
    if biased:
        raise UserError(f"config.{biased[0]}=true: shared experts with biases are not supported")
    sparse, routing = family.pattern.read(config), family.routing(config)
    num_experts = getattr(config, family.num_experts) or 0
    return Facts(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        moe_layers=tuple(layer for layer, is_sparse in enumerate(sparse) if is_sparse and num_experts),
        num_experts=num_experts,
        top_k=routing.top_k,
        hidden_size=config.hidden_size,
        expert_width=getattr(config, family.expert_width),
        shared_width=family.shared_width(config),
        shared_gate=family.shared_expert_gate is not None,
        num_groups=routing.num_groups,
        top_groups=routing.top_groups,
    )


def facts(config: PretrainedConfig) -> Facts:
    """The MoE layers that the config describes; those of a compressed model as they are now.

    Raises:
        UserError: as `original_facts`; a model without MoE layers.
    """
    original = original_facts(config)
    shapes = {layer: shape for layer, shape in compressed_layers(config).items() if layer in original.moe_layers}
    sparse = [layer for layer in original.moe_layers if shapes.get(layer, {}).get("kind", "sparse") == "sparse"]
    if not sparse:
        raise UserError(
            f"the model ({original.model_type}, {original.num_layers} layers) has no MoE layers: there is nothing to "
            "condense"
        )
    return replace(
        original,
        moe_layers=tuple(sparse),
        num_experts=min(shapes.get(layer, {}).get("num_experts", original.num_experts) for layer in sparse),
        factorized=tuple(layer for layer in sparse if shapes.get(layer, {}).get("ranks")),
    )


def stock_updates(
    config: PretrainedConfig,
    dense: Collection[int],
    skipped: Collection[int],
    num_experts: int | None,
    width: int | None = None,
) -> dict[str, Any] | None:
    """Config updates that give the family's own class these layers; None if the class cannot have them.

    Args:
        dense: decoder layers with an MLP in place of their MoE block.
        skipped: removed decoder layers; those after them move up.
        num_experts: of every sparse layer, if that changed.
        width: of all dense layers, if that changed.
    """
    family = family_of(config)
    sparse = family.pattern.read(config)
    kept = [layer for layer in range(config.num_hidden_layers) if layer not in skipped]
    updates: dict[str, Any] = {}
    if dense or skipped:
        sparse_updates = family.pattern.write([sparse[layer] and layer not in dense for layer in kept])
        if sparse_updates is None:
            return None
        updates |= sparse_updates
    if skipped:
        updates["num_hidden_layers"] = len(kept)
        for name in PER_LAYER:
            if name not in updates and getattr(config, name, None) is not None:
                updates[name] = [getattr(config, name)[layer] for layer in kept]
        if not _is_usual(config, updates.get("layer_types", ())):
            return None
    if num_experts is not None:
        updates[family.num_experts] = num_experts
    if width is not None:
        updates["intermediate_size"] = width
    return updates


def _is_usual(config: PretrainedConfig, types: Sequence[str]) -> bool:
    """Whether the attention types are the family's default for this number of layers.

    vLLM 0.32 assumes the default (gpt_oss: every other layer slides) and ignores `layer_types`.
    """
    if len(set(types)) < 2:
        return True
    usual = cast(Any, type(config))(num_hidden_layers=len(types)).layer_types
    return list(types) == list(usual or ())


def dense_widths(config: PretrainedConfig) -> Mapping[int, int]:
    """The widths of the family's own dense layers, by decoder-layer index."""
    sparse = family_of(config).pattern.read(config)
    return {layer: config.intermediate_size for layer, is_sparse in enumerate(sparse) if not is_sparse}
