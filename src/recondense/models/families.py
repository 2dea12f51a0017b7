"""What the configs of the supported families say of their MoE layers, before any weight is loaded.

A family is a model_type of transformers whose experts are fused and whose blocks add their output to the residual
stream as it is. With families.py this is the only place that knows Hugging Face names.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

from transformers import PretrainedConfig

from recondense.errors import UserError
from recondense.models.compressed import PREFIX


@dataclass(frozen=True)
class Facts:
    """What a model's config says of its MoE layers.

    Args:
        moe_layers: decoder-layer indices of the sparse layers, ascending.
        num_experts: routed experts of a sparse layer; the fewest, where a compressed model's layers differ.
        expert_width: F, rows of one routed expert.
        shared_width: rows of the shared experts together, 0 without any.
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
    def least_experts(self) -> int:
        """The fewest that a layer can route among."""
        return least_experts(self.top_k, self.num_groups, self.top_groups)


@dataclass(frozen=True)
class Routing:
    """What a router does with its logits: scores of all experts, the top_k of them, then this.

    Args:
        top_k: experts a token.
        normalize: the selected weights are divided by their sum.
        scale: then multiplied by this.
        score: softmax over all experts, or a sigmoid each. A softmax over the selected logits alone is softmax with
            `normalize`.
        num_groups, top_groups: experts stand in groups of equal size; only those of the best top_groups are selected.
        least_sum: the least that selected weights are divided by, as all of them may be next to 0 where not the scores
            alone decide the selection; added to the sum of sigmoids.
    """

    top_k: int
    normalize: bool
    scale: float = 1.0
    score: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    least_sum: float = 0.0

    @property
    def least_experts(self) -> int:
        """The fewest that a layer can route among."""
        return least_experts(self.top_k, self.num_groups, self.top_groups)


def least_experts(top_k: int, num_groups: int, top_groups: int) -> int:
    """As many as a token selects; of grouped ones at least two a group, and enough of them in the selected groups."""
    return top_k if num_groups == 1 else num_groups * max(2, -(-top_k // top_groups))


class Pattern(NamedTuple):
    """How a config says which decoder layers are sparse.

    Args:
        read: whether each layer is.
        write: config updates that say so; None where the family's class cannot hold such a model.
    """

    read: Callable[[PretrainedConfig], list[bool]]
    write: Callable[[Sequence[bool]], dict[str, Any] | None]


@dataclass(frozen=True)
class Family:
    """Where one model_type keeps things.

    Args:
        num_experts: what published configs call the number of routed experts.
        pattern: which layers are sparse.
        routing: what the router does.
        expert_width: what the config calls F.
        shared_width: rows of the shared experts together.
        shared_expert, shared_expert_gate: attributes of a sparse block.
        router_entries, expert_entries: tensors of its router and of its experts module with an entry an expert.
        carried: its model is recondense's own, so that even stock exports carry a modeling file.
        masks_of_types: transformers 5.23 makes its attention masks without the positions, so that it does not keep
            packed examples apart; it takes one mask for each kind of layer instead.
        needs_sparse: vLLM 0.32's class of it does not load a model without MoE layers, which transformers' does.
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
    masks_of_types: bool = False
    needs_sparse: bool = False


def _dense_first(sparse: Sequence[bool]) -> int | None:
    """How many dense layers stand before the sparse ones; None where one stands after."""
    first = list(sparse).index(True) if any(sparse) else len(sparse)
    return first if all(sparse[first:]) else None


def _write_prefix(sparse: Sequence[bool]) -> dict[str, Any] | None:
    first = _dense_first(sparse)
    return None if first is None else {"first_k_dense_replace": first}


def _write_frequency(sparse: Sequence[bool]) -> dict[str, Any] | None:
    prefix = _write_prefix(sparse)
    return None if prefix is None else {**prefix, "moe_layer_freq": 1}


def _read_mlp_only(config: PretrainedConfig) -> list[bool]:
    return [
        layer not in (config.mlp_only_layers or ())
        and config.num_experts > 0
        and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(config.num_hidden_layers)
    ]


def _read_interval(config: PretrainedConfig) -> list[bool]:
    return [
        (layer + 1) % config.moe_layer_interval == 0
        and config.moe_layer_start_index <= layer <= config.moe_layer_end_index
        for layer in range(config.num_hidden_layers)
    ]


def _write_interval(sparse: Sequence[bool]) -> dict[str, Any] | None:
    layers = [layer for layer, each in enumerate(sparse) if each]
    first, last = (layers[0], layers[-1]) if layers else (len(sparse), len(sparse) - 1)
    if len(layers) != last - first + 1:
        return None
    return {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": 1}


EVERY = Pattern(lambda config: [True] * config.num_hidden_layers, lambda sparse: {} if all(sparse) else None)
MLP_ONLY = Pattern(
    _read_mlp_only,
    lambda sparse: {"mlp_only_layers": [i for i, each in enumerate(sparse) if not each], "decoder_sparse_step": 1},
)
PREFIXED = Pattern(
    lambda config: [layer >= config.first_k_dense_replace for layer in range(config.num_hidden_layers)], _write_prefix
)
FREQUENCY = Pattern(
    lambda config: [
        layer >= config.first_k_dense_replace and layer % config.moe_layer_freq == 0
        for layer in range(config.num_hidden_layers)
    ],
    _write_frequency,
)
INTERVAL = Pattern(_read_interval, _write_interval)
TYPES = Pattern(
    lambda config: [kind == "sparse" for kind in config.mlp_layer_types],
    lambda sparse: {"mlp_layer_types": ["sparse" if each else "dense" for each in sparse]},
)


def _plain(config: PretrainedConfig) -> Routing:
    return Routing(config.num_experts_per_tok, normalize=bool(config.norm_topk_prob))


def _deepseek(config: PretrainedConfig) -> Routing:
    """With one expert a token nothing is renormalised."""
    routing = _plain(config)
    return replace(routing, normalize=routing.normalize and routing.top_k > 1)


def _normalized(config: PretrainedConfig) -> Routing:
    return Routing(config.num_experts_per_tok, normalize=True)


def _deepseek_v2(config: PretrainedConfig) -> Routing:
    """transformers ignores `norm_topk_prob` here, and groups unless the method is group_limited_greedy."""
    routing = Routing(config.num_experts_per_tok, normalize=False, scale=float(config.routed_scaling_factor))
    if config.topk_method != "group_limited_greedy":
        return routing
    return replace(routing, num_groups=config.n_group, top_groups=config.topk_group)


def _deepseek_v3(config: PretrainedConfig) -> Routing:
    return Routing(
        config.num_experts_per_tok,
        normalize=bool(config.norm_topk_prob),
        scale=float(config.routed_scaling_factor),
        score="sigmoid",
        num_groups=config.n_group,
        top_groups=config.topk_group,
        least_sum=1e-20,
    )


def _ernie(config: PretrainedConfig) -> Routing:
    return replace(_normalized(config), least_sum=float(config.moe_norm_min))


def _shared(config: PretrainedConfig) -> int:
    return config.moe_intermediate_size * (config.n_shared_experts or 0)


_V3 = Family(
    "n_routed_experts",
    PREFIXED,
    _deepseek_v3,
    shared_width=_shared,
    shared_expert="shared_experts",
    router_entries=("weight", "e_score_correction_bias"),
)

FAMILIES: dict[str, Family] = {
    "qwen2_moe": Family(
        "num_experts",
        MLP_ONLY,
        _plain,
        shared_width=lambda config: config.shared_expert_intermediate_size,
        shared_expert="shared_expert",
        shared_expert_gate="shared_expert_gate",
    ),
    "qwen3_moe": Family("num_experts", MLP_ONLY, _plain, needs_sparse=True),
    "deepseek": Family(
        "n_routed_experts", FREQUENCY, _deepseek, shared_width=_shared, shared_expert="shared_experts", carried=True
    ),
    "deepseek_v2": Family(
        "n_routed_experts", PREFIXED, _deepseek_v2, shared_width=_shared, shared_expert="shared_experts"
    ),
    "deepseek_v3": _V3,
    "mixtral": Family("num_local_experts", EVERY, _normalized, expert_width="intermediate_size"),
    "olmoe": Family("num_experts", EVERY, _plain, expert_width="intermediate_size"),
    "gpt_oss": Family(
        "num_local_experts",
        EVERY,
        _normalized,
        expert_width="intermediate_size",
        router_entries=("weight", "bias"),
        expert_entries=("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
        masks_of_types=True,
    ),
    "glm4_moe": replace(_V3, needs_sparse=True),
    "ernie4_5_moe": Family(
        "moe_num_experts",
        INTERVAL,
        _ernie,
        shared_width=lambda config: config.moe_intermediate_size * (config.moe_num_shared_experts or 0),
        shared_expert="shared_experts",
        router_entries=("weight", "moe_statics.e_score_correction_bias"),
    ),
    # These need nothing that those above do not have.
    "dots1": _V3,
    "solar_open": replace(_V3, pattern=EVERY),
    "glm4_moe_lite": replace(_V3, pattern=TYPES, needs_sparse=True),
    "mellum": Family("num_experts", TYPES, _plain),
}

# Lists of one entry a decoder layer, by name: those whose length transformers checks against num_hidden_layers. Others
# may only happen to be as long, as eos_token_id.
PER_LAYER = ("layer_types", "mlp_layer_types")
BIASED = ("mlp_bias", "use_bias")  # of shared experts and dense layers: not supported


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
    """What the config says of layers that were compressed before; empty for a family's own config."""
    return {int(layer): shape for layer, shape in (getattr(config, "compressed_layers", None) or {}).items()}


def original_facts(config: PretrainedConfig) -> Facts:
    """Facts of the family's own model, before what `compressed_layers` says; it may have no MoE layers.

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
        moe_layers=tuple(layer for layer, each in enumerate(sparse) if each and num_experts),
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
    """What the config says of the MoE layers, those of a compressed model as they are now.

    Raises:
        UserError: as `original_facts`; a model without MoE layers.
    """
    found = original_facts(config)
    shapes = {layer: shape for layer, shape in compressed_layers(config).items() if layer in found.moe_layers}
    left = [layer for layer in found.moe_layers if shapes.get(layer, {}).get("kind", "sparse") == "sparse"]
    if not left:
        raise UserError(
            f"the model ({found.model_type}, {found.num_layers} layers) has no MoE layers: there is nothing to condense"
        )
    return replace(
        found,
        moe_layers=tuple(left),
        num_experts=min(shapes.get(layer, {}).get("num_experts", found.num_experts) for layer in left),
        factorized=tuple(layer for layer in left if shapes.get(layer, {}).get("ranks")),
    )


def stock_updates(
    config: PretrainedConfig,
    dense: Collection[int],
    skipped: Collection[int],
    num_experts: int | None,
    width: int | None = None,
) -> dict[str, Any] | None:
    """Config updates with which the family's own class has these layers; None if it cannot.

    Args:
        dense: decoder layers whose MoE block became a dense one.
        width: of all dense layers, if that changed.
        skipped: decoder layers that are gone; those after them move up.
        num_experts: of every sparse layer, if that changed.
    """
    family = family_of(config)
    sparse = family.pattern.read(config)
    kept = [layer for layer in range(config.num_hidden_layers) if layer not in skipped]
    updates: dict[str, Any] = {}
    if dense or skipped:
        said = family.pattern.write([sparse[layer] and layer not in dense for layer in kept])
        if said is None:
            return None
        updates |= said
    if skipped:
        updates["num_hidden_layers"] = len(kept)
        for name in PER_LAYER:
            if name not in updates and getattr(config, name, None) is not None:
                updates[name] = [getattr(config, name)[layer] for layer in kept]
        if not _follows(config, updates.get("layer_types", ())):
            return None
    if num_experts is not None:
        updates[family.num_experts] = num_experts
    if width is not None:
        updates["intermediate_size"] = width
    return updates


def _follows(config: PretrainedConfig, types: Sequence[str]) -> bool:
    """Whether kinds of attention lie as in any config of the family of so many layers.

    vLLM 0.32 goes by that (gpt_oss: every other layer slides) and not by `layer_types`.
    """
    if len(set(types)) < 2:
        return True
    usual = cast(Any, type(config))(num_hidden_layers=len(types)).layer_types
    return list(types) == list(usual or ())


def dense_widths(config: PretrainedConfig) -> Mapping[int, int]:
    """Width of the family's own dense layers, by decoder-layer index."""
    sparse = family_of(config).pattern.read(config)
    return {layer: config.intermediate_size for layer, each in enumerate(sparse) if not each}
