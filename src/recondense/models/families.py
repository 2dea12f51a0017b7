"""The table of families: how to read the MoE layers of a model from its config, before weights are loaded.

A family is a model_type of transformers whose routed experts are fused and whose blocks' output is added to the
residual stream unchanged.
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
        model_type: the model_type of the config.
        num_layers: number of decoder layers.
        moe_layers: decoder-layer indices of the sparse layers, ascending.
        num_experts: routed experts per sparse layer; the smallest number if the layers of a compressed model differ.
        top_k: number of experts that a token selects.
        hidden_size: D.
        expert_width: F, the rows of one routed expert.
        shared_width: the rows of all shared experts together; 0 without shared experts.
        shared_gate: whether the shared experts have a gate per token.
        num_groups: number of groups of experts; 1 if the router does not select groups.
        top_groups: number of groups from which experts are selected.
        factorized: the sparse layers whose experts are already low-rank, or constants.
        uneven: the sparse layers whose experts differ in width from each other or from those of other layers.
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
    uneven: tuple[int, ...] = ()

    @property
    def min_experts(self) -> int:
        """The fewest experts that a layer can route among."""
        return min_experts(self.top_k, self.num_groups, self.top_groups)


@dataclass(frozen=True)
class Family:
    """The names of one model_type, and the differences between families.

    Args:
        num_experts: the name in the config of the number of routed experts.
        pattern: how the config says which layers are sparse.
        routing: reads the routing from the config.
        expert_width: the name in the config of F.
        shared_width: reads the rows of all shared experts together from the config.
        shared_count: the name in the config of the number of shared experts, if each is as wide as a routed expert;
            None if the config has their width.
        shared_expert: the attribute of the sparse block that has the shared experts; None without shared experts.
        shared_expert_gate: the attribute of the sparse block that has their gate; None without a gate.
        router_entries: names of the router's tensors that have one entry per expert.
        expert_entries: names of the experts module's tensors that have one entry per expert.
        carried: whether the model class is in recondense and not in transformers, so that even stock exports include a
            modeling file.
        needs_packed_masks: whether the model needs one attention mask for each attention type to separate packed
            examples, because transformers 5.23 makes its masks without the positions.
        needs_sparse: whether the class in vLLM 0.32 cannot load a model without MoE layers; the one in transformers
            can.
    """

    num_experts: str
    pattern: Pattern
    routing: Callable[[PretrainedConfig], Routing]
    expert_width: str = "moe_intermediate_size"
    shared_width: Callable[[PretrainedConfig], int] = lambda config: 0
    shared_count: str | None = None
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
    shared_count="n_shared_experts",
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
        "n_routed_experts",
        FREQUENCY,
        read_deepseek,
        shared_width=_shared,
        shared_count="n_shared_experts",
        shared_expert="shared_experts",
        carried=True,
    ),
    "deepseek_v2": Family(
        "n_routed_experts",
        PREFIXED,
        read_deepseek_v2,
        shared_width=_shared,
        shared_count="n_shared_experts",
        shared_expert="shared_experts",
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
        shared_count="moe_num_shared_experts",
        shared_expert="shared_experts",
        router_entries=("weight", "moe_statics.e_score_correction_bias"),
    ),
    # Families that only combine the entries above.
    "dots1": _V3,
    "solar_open": replace(_V3, pattern=EVERY),
    "glm4_moe_lite": replace(_V3, pattern=TYPES, needs_sparse=True),
    "mellum": Family("num_experts", TYPES, read_plain),
}

# Config entries that are lists with one value per decoder layer. They are named, because another list, such as
# eos_token_id, may have the same length by chance.
PER_LAYER = ("layer_types", "mlp_layer_types")
BIASED = ("mlp_bias", "use_bias")  # config entries for biases of shared experts and dense layers: not supported


def family_name(model_type: object) -> str:
    """Return the name of the family of a model_type, compressed or not.

    Raises:
        UserError: the model_type is not supported.
    """
    name = str(model_type).removeprefix(PREFIX)
    if name not in FAMILIES:
        close = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.8)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"model_type {model_type!r} is not supported{hint}; supported: {', '.join(sorted(FAMILIES))}")
    return name


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a config.

    Raises:
        UserError: the model_type is not supported.
    """
    return FAMILIES[family_name(config.model_type)]


def compressed_layers(config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """Return the shapes of compressed layers, by decoder-layer index; empty for a family's own config."""
    return {int(layer): shape for layer, shape in (getattr(config, "compressed_layers", None) or {}).items()}


def original_facts(config: PretrainedConfig) -> Facts:
    """Return the facts of the uncompressed model, ignoring `compressed_layers`; it may have no MoE layers.

    Raises:
        UserError: the model_type is not supported, or the shared experts have biases.
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
    """Return the MoE layers that a config describes; for a compressed model, its remaining sparse layers.

    Raises:
        UserError: the model_type is not supported, the shared experts have biases, or the model has no MoE layers.
    """
    original = original_facts(config)
    shapes = {layer: shape for layer, shape in compressed_layers(config).items() if layer in original.moe_layers}
    sparse = [layer for layer in original.moe_layers if shapes.get(layer, {}).get("kind", "sparse") == "sparse"]
    if not sparse:
        raise UserError(
            f"the model ({original.model_type}, {original.num_layers} layers) has no MoE layers: there is nothing to "
            "compress"
        )
    widths = {layer: shapes.get(layer, {}).get("expert_width", original.expert_width) for layer in sparse}
    common = next(iter(widths.values()))
    is_even = isinstance(common, int) and all(width == common for width in widths.values())
    return replace(
        original,
        moe_layers=tuple(sparse),
        expert_width=common if is_even else original.expert_width,
        uneven=() if is_even else tuple(sparse),
        num_experts=min(shapes.get(layer, {}).get("num_experts", original.num_experts) for layer in sparse),
        factorized=tuple(layer for layer in sparse if shapes.get(layer, {}).keys() & {"ranks", "constants"}),
    )


def stock_updates(
    config: PretrainedConfig,
    dense: Collection[int],
    skipped: Collection[int],
    num_experts: int | None,
    width: int | None = None,
    expert_width: int | None = None,
) -> dict[str, Any] | None:
    """Return the config updates with which the family's own class has these layers; None if it cannot have them.

    Args:
        config: the config of the model.
        dense: decoder layers with an MLP instead of their MoE block.
        skipped: removed decoder layers; the layers after them are renumbered.
        num_experts: number of experts of every sparse layer; None if unchanged.
        width: width of all dense layers; None if unchanged.
        expert_width: width of all routed experts; None if unchanged. If the shared experts are each as wide, their
            number changes too; see `keeps_shared_width`.
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
    if expert_width is not None:
        updates[family.expert_width] = expert_width
        if family.shared_count is not None:
            updates[family.shared_count] = family.shared_width(config) // expert_width
    return updates


def keeps_shared_width(config: PretrainedConfig, expert_width: int) -> bool:
    """Return whether the family's config can have routed experts of this width without changing its shared experts.

    Some families have a number of shared experts that are each as wide as a routed expert. Together they must then be
    a multiple of the new width.
    """
    family = family_of(config)
    return family.shared_count is None or family.shared_width(config) % expert_width == 0


def _is_usual(config: PretrainedConfig, types: Sequence[str]) -> bool:
    """Return whether the attention types are the family's default for this number of layers.

    vLLM 0.32 assumes the default (gpt_oss: sliding attention in every other layer) and ignores `layer_types`.
    """
    if len(set(types)) < 2:
        return True
    usual = cast(Any, type(config))(num_hidden_layers=len(types)).layer_types
    return list(types) == list(usual or ())


def dense_widths(config: PretrainedConfig) -> Mapping[int, int]:
    """Return the widths of the family's own dense layers, by decoder-layer index."""
    sparse = family_of(config).pattern.read(config)
    return {layer: config.intermediate_size for layer, is_sparse in enumerate(sparse) if not is_sparse}
