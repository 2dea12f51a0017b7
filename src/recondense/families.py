"""The only file that knows Hugging Face attribute names: uniform views of MoE layers.

A family is a model_type of transformers whose experts are fused: `experts.gate_up_proj` (E, 2F, D) and
`experts.down_proj` (E, D, F), and whose router returns (logits, top_k_weights, top_k_index).

Legend: E routed experts, D hidden size, F expert width.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from recondense.modules import CondensedMoE, MoEWeights, RemappedRouter, SkippedLayer, shallow_copy, sliced


@dataclass(frozen=True)
class Facts:
    """What a model's config says of its MoE layers, before any weight is loaded.

    Args:
        moe_layers: decoder-layer indices of the sparse layers, ascending.
        expert_width: F, rows of one routed expert.
        shared_width: rows of the shared experts together, 0 without any.
        shared_gate: whether the shared experts have a gate per token.
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


@dataclass(frozen=True)
class Routing:
    """What a router does with its logits: softmax over all experts, the top_k of them, then this.

    Args:
        top_k: experts a token.
        normalize: the selected weights are divided by their sum.
        scale: then multiplied by this.
        num_groups, top_groups: experts stand in groups of equal size; only those of the best top_groups are selected.
    """

    top_k: int
    normalize: bool
    scale: float
    num_groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True)
class Counts:
    """Parameters of the uncompressed model, from its config alone.

    Args:
        total: of the whole model, tied ones once.
        routed_experts: of all routed experts.
        expert: of one routed expert, 3·D·F.
        router_row: of one expert's row in the router.
    """

    total: int
    routed_experts: int
    expert: int
    router_row: int


@dataclass(frozen=True)
class Family:
    """Where one model_type keeps things."""

    facts: Callable[[PretrainedConfig], Facts]
    routing: Callable[[PretrainedConfig], Routing]
    num_experts: str  # what the config calls the number of routed experts
    shared_expert: str | None
    shared_expert_gate: str | None = None
    # Config updates with which stock transformers holds condensed layers, given {layer: width}; None if it cannot.
    dense_layers: Callable[[PretrainedConfig, dict[int, int]], dict[str, object] | None] = lambda config, widths: None


@dataclass(frozen=True)
class SparseBlock:
    """A view of one sparse MoE layer: the module's own tensors, never copies."""

    layer: int
    module: nn.Module
    router: nn.Module
    experts: nn.Module
    shared_expert: nn.Module | None
    shared_expert_gate: nn.Module | None
    routing: Routing

    @property
    def weights(self) -> MoEWeights:
        """The layer's own tensors; gate_up (E, 2F, D), down (E, D, F).

        Raises:
            ValueError: the experts are factorized.
        """
        if not hasattr(self.experts, "gate_up_proj"):
            raise ValueError(f"layer {self.layer}: its experts are factorized; this needs whole ones, so do it before")
        shared = self.shared_expert
        projections = ("gate_proj", "up_proj", "down_proj")
        return MoEWeights(
            gate_up_EHD=self.experts.gate_up_proj,  # type: ignore[arg-type]
            down_EDF=self.experts.down_proj,  # type: ignore[arg-type]
            act_fn=self.experts.act_fn,  # type: ignore[arg-type]
            shared=None if shared is None else tuple(getattr(shared, name).weight for name in projections),  # type: ignore[arg-type]
            shared_gate=None if self.shared_expert_gate is None else self.shared_expert_gate.weight,  # type: ignore[arg-type]
        )

    @property
    def num_experts(self) -> int:
        return int(self.experts.num_experts)  # type: ignore[arg-type]


def _qwen2_moe_facts(config: PretrainedConfig) -> Facts:
    layers = [
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in (config.mlp_only_layers or ())
        and config.num_experts > 0
        and (layer + 1) % config.decoder_sparse_step == 0
    ]
    return Facts(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        moe_layers=tuple(layers),
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        hidden_size=config.hidden_size,
        expert_width=config.moe_intermediate_size,
        shared_width=config.shared_expert_intermediate_size,
        shared_gate=True,
    )


def _qwen2_moe_routing(config: PretrainedConfig) -> Routing:
    return Routing(config.num_experts_per_tok, normalize=bool(config.norm_topk_prob), scale=1.0)


def _qwen2_moe_dense_layers(config: PretrainedConfig, widths: dict[int, int]) -> dict[str, object] | None:
    """Stock Qwen2-MoE has dense layers of one width: `mlp_only_layers` and `intermediate_size`."""
    facts = _qwen2_moe_facts(config)
    dense = sorted(set(range(facts.num_layers)) - set(facts.moe_layers))
    needed = set(widths.values()) | ({config.intermediate_size} if dense else set())
    if len(needed) > 1:
        return None
    return {
        "mlp_only_layers": sorted({*dense, *widths}),
        "intermediate_size": needed.pop() if needed else config.intermediate_size,
    }


def _deepseek_v2_facts(config: PretrainedConfig) -> Facts:
    num_experts = config.n_routed_experts or 0
    layers = range(config.first_k_dense_replace, config.num_hidden_layers) if num_experts else ()
    return Facts(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        moe_layers=tuple(layers),
        num_experts=num_experts,
        top_k=config.num_experts_per_tok,
        hidden_size=config.hidden_size,
        expert_width=config.moe_intermediate_size,
        shared_width=config.moe_intermediate_size * (config.n_shared_experts or 0),
        shared_gate=False,
        num_groups=_deepseek_v2_routing(config).num_groups,
    )


def _deepseek_v2_routing(config: PretrainedConfig) -> Routing:
    """transformers ignores `norm_topk_prob` here, and groups unless the method is group_limited_greedy."""
    grouped = config.topk_method == "group_limited_greedy"
    return Routing(
        config.num_experts_per_tok,
        normalize=False,
        scale=float(config.routed_scaling_factor),
        num_groups=config.n_group if grouped else 1,
        top_groups=config.topk_group if grouped else 1,
    )


# Lists of one entry a decoder layer, by name: those whose length transformers checks against num_hidden_layers. Others
# may only happen to be as long, as eos_token_id.
PER_LAYER = ("layer_types", "mlp_layer_types")


def _without_layers(config: PretrainedConfig, dropped: Collection[int]) -> dict[str, object] | None:
    """Config updates of a model that lacks some decoder layers, the others renumbered; None if it cannot be said."""
    if getattr(config, "decoder_sparse_step", 1) != 1 or any(
        layer < getattr(config, "first_k_dense_replace", 0) for layer in dropped
    ):
        return None
    kept = [layer for layer in range(config.num_hidden_layers) if layer not in dropped]
    updates: dict[str, object] = {"num_hidden_layers": len(kept)}
    if getattr(config, "mlp_only_layers", None):
        updates["mlp_only_layers"] = [kept.index(layer) for layer in config.mlp_only_layers if layer in kept]
    for name in PER_LAYER:
        if getattr(config, name, None) is not None:
            updates[name] = [getattr(config, name)[layer] for layer in kept]
    return updates


# What follows modules.py and low_rank.py in the modeling file. The model_type is its own: without trust_remote_code
# loading fails loudly, where a stock model_type would load the stock class with missing weights.
BUNDLE = '''

from transformers import {config_class}, {model_class}
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

MODEL_TYPE = "recondense_{model_type}"
register_checkpoint_conversion_mapping(
    MODEL_TYPE, get_checkpoint_conversion_mapping("{model_type}") or [], overwrite=True
)


class CompressedConfig({config_class}):
    model_type = MODEL_TYPE


class CompressedForCausalLM({model_class}):
    """{model_class} in which the layers of `config.compressed_layers` have other shapes."""

    config_class = CompressedConfig

    def __init__(self, config):
        super().__init__(config)
        for layer, shape in config.compressed_layers.items():
            reshape(self.model.layers, int(layer), config.hidden_size, **shape)
        self.post_init()


def reshape(layers, index, hidden_size, kind, num_experts=None, router_rows=None, ranks=None, merged=False, **widths):
    layer = layers[index]
    if kind == "skipped":
        layers[index] = SkippedLayer()
        return
    if kind == "zeros":
        layer.mlp = Zeros()
        return
    experts, router = layer.mlp.experts, layer.mlp.gate
    if kind == "condensed":
        layer.mlp = CondensedMoE(hidden_size, act_fn=experts.act_fn, scaled=False, **widths)
        return
    before = router.num_experts
    if router_rows != before:
        router = sliced(router, range(router_rows), before)
    if ranks is not None:
        experts = LowRankExperts(hidden_size, experts.down_proj.shape[-1], ranks, experts.act_fn)
    elif num_experts != before:
        experts = sliced(experts, range(num_experts), before)
    layer.mlp.gate = RemappedRouter(router, torch.zeros(router_rows, dtype=torch.int64)) if merged else router
    layer.mlp.experts = experts
'''

FAMILIES: dict[str, Family] = {
    "qwen2_moe": Family(
        _qwen2_moe_facts,
        _qwen2_moe_routing,
        "num_experts",
        "shared_expert",
        "shared_expert_gate",
        _qwen2_moe_dense_layers,
    ),
    "deepseek_v2": Family(_deepseek_v2_facts, _deepseek_v2_routing, "n_routed_experts", "shared_experts"),
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a config.

    Raises:
        ValueError: a model_type that is not supported.
    """
    model_type = str(config.model_type)
    if model_type not in FAMILIES:
        close = difflib.get_close_matches(model_type, FAMILIES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"model_type {model_type!r} is not supported{hint}; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def facts(config: PretrainedConfig) -> Facts:
    """What the config says of the MoE layers.

    Raises:
        ValueError: an unsupported model_type, or a model without MoE layers.
    """
    found = family_of(config).facts(config)
    if not found.moe_layers:
        raise ValueError(
            f"the model ({found.model_type}, {found.num_layers} layers) has no MoE layers: there is nothing to condense"
        )
    return found


def cache_layers(config: PretrainedConfig) -> set[int]:
    """Decoder layers whose cache says how long all of one attention type are: the first, and the first of each type."""
    types = getattr(config, "layer_types", None) or ["full_attention"]
    return {0, *(types.index(each) for each in set(types))}


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.model.layers  # type: ignore[return-value,union-attr]


def final_norm(model: PreTrainedModel) -> nn.Module:
    return model.model.norm  # type: ignore[return-value,union-attr]


def decoder(model: PreTrainedModel) -> nn.Module:
    """The causal LM without its head."""
    return model.model  # type: ignore[return-value]


def get_block(model: PreTrainedModel, layer: int) -> nn.Module:
    """What surgery changes of a decoder layer: its feed-forward block, or `SkippedLayer` where all of it is removed."""
    decoder_layer = decoder_layers(model)[layer]
    return decoder_layer if isinstance(decoder_layer, SkippedLayer) else decoder_layer.mlp  # type: ignore[return-value]


def set_block(model: PreTrainedModel, layer: int, block: nn.Module) -> None:
    """Put a feed-forward block in its place, or a whole decoder layer, or `SkippedLayer` in place of that."""
    if isinstance(block, SkippedLayer) or hasattr(block, "self_attn"):
        decoder_layers(model)[layer] = block
    else:
        decoder_layers(model)[layer].mlp = block


def is_sparse(block: nn.Module) -> bool:
    return hasattr(block, "experts") and hasattr(block, "gate")


def with_parts(block: nn.Module, router: nn.Module | None = None, experts: nn.Module | None = None) -> nn.Module:
    """A sparse block with another router or other experts; everything else is shared with the given one."""
    twin = shallow_copy(block)
    if router is not None:
        twin.gate = router
    if experts is not None:
        twin.experts = experts
    return twin


def pruned_router(block: SparseBlock, retained: Sequence[int]) -> nn.Module:
    """The router with the rows of some experts only.

    Raises:
        ValueError: fewer experts than top_k, merged experts, or groups of unequal size or of fewer than two.
    """
    routing, num_experts = block.routing, block.num_experts
    if isinstance(block.router, RemappedRouter):
        raise ValueError(f"layer {block.layer}: its experts are merged, so they cannot be pruned any more")
    if len(retained) < routing.top_k:
        raise ValueError(
            f"layer {block.layer}: {len(retained)} experts retained, but each token selects {routing.top_k}; retain at "
            "least as many"
        )
    if routing.num_groups > 1:
        size = num_experts // routing.num_groups
        sizes = [sum(expert // size == group for expert in retained) for group in range(routing.num_groups)]
        if len(set(sizes)) > 1 or sizes[0] < 2:
            raise ValueError(
                f"layer {block.layer}: the router selects {routing.top_groups} of {routing.num_groups} groups first; "
                f"pruning would leave groups of {sizes} experts, which must be equal and at least 2"
            )
    return sliced(block.router, retained, num_experts)


def masked_block(block: SparseBlock, retained: Sequence[int]) -> nn.Module:
    """The block as pruning would leave it, without a copy of any expert: for trying it out.

    Raises:
        ValueError: as `pruned_router`.
    """
    table = torch.as_tensor(retained, device=next(block.experts.parameters()).device)
    return with_parts(block.module, router=RemappedRouter(pruned_router(block, retained), table))


@cache
def _counts(text: str, kind: type[PretrainedConfig]) -> Counts:
    config = kind.from_dict(json.loads(text))
    found = facts(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expert = 3 * found.hidden_size * found.expert_width
    return Counts(
        total=sum(parameter.numel() for parameter in model.parameters()),
        routed_experts=expert * found.num_experts * len(found.moe_layers),
        expert=expert,
        router_row=found.hidden_size,
    )


def parameter_counts(config: PretrainedConfig) -> Counts:
    """Parameters of the uncompressed model that a config describes; built on the meta device, without weights.

    Raises:
        ValueError: as `facts`.
    """
    return _counts(json.dumps(config.to_dict(), sort_keys=True, default=str), type(config))  # type: ignore[arg-type]


def expert_modules(model: PreTrainedModel, layer: int) -> dict[str, nn.Module]:
    """Routed and shared experts of a sparse layer, by their names within its block; no router, no gate."""
    if not is_sparse(get_block(model, layer)):
        return {}
    block = sparse_view(model, layer, get_block(model, layer))
    found = {"experts": block.experts}
    if block.shared_expert is not None:
        found[str(family_of(model.config).shared_expert)] = block.shared_expert
    return found


def block_name(layer: int) -> str:
    """The state-dict prefix of a decoder layer's feed-forward block, without the last dot."""
    return f"model.layers.{layer}.mlp"


def sparse_view(model: PreTrainedModel, layer: int, module: nn.Module) -> SparseBlock:
    """The view of a sparse block, in the model or taken out of it."""
    family = family_of(model.config)
    return SparseBlock(
        layer=layer,
        module=module,
        router=module.gate,  # type: ignore[arg-type]
        experts=module.experts,  # type: ignore[arg-type]
        shared_expert=getattr(module, family.shared_expert or "", None),
        shared_expert_gate=getattr(module, family.shared_expert_gate or "", None),
        routing=family.routing(model.config),
    )


def sparse_blocks(model: PreTrainedModel) -> dict[int, SparseBlock]:
    """Views of the layers that are sparse now, by decoder-layer index, ascending."""
    blocks = {layer: get_block(model, layer) for layer in range(len(decoder_layers(model)))}
    return {layer: sparse_view(model, layer, block) for layer, block in blocks.items() if is_sparse(block)}


@contextmanager
def swapped(model: PreTrainedModel, blocks: Mapping[int, nn.Module]) -> Iterator[PreTrainedModel]:
    """Inside, these blocks (or whole decoder layers) stand in the model; after, its own again. No weight is copied."""
    own = {layer: _standing_in(model, layer, block) for layer, block in blocks.items()}
    for layer, block in blocks.items():
        set_block(model, layer, block)
    try:
        yield model
    finally:
        for layer, block in own.items():
            set_block(model, layer, block)


def _standing_in(model: PreTrainedModel, layer: int, block: nn.Module) -> nn.Module:
    """What `set_block` with this block would displace: a whole decoder layer for a whole one."""
    whole = isinstance(block, SkippedLayer) or hasattr(block, "self_attn")
    return decoder_layers(model)[layer] if whole else get_block(model, layer)


def attention_linears(model: PreTrainedModel) -> list[str]:
    """Names of the Linear layers of every decoder layer's attention."""
    return [
        f"model.layers.{index}.self_attn.{name}"
        for index, layer in enumerate(decoder_layers(model))
        if not isinstance(layer, SkippedLayer)
        for name, module in layer.self_attn.named_modules()  # type: ignore[union-attr]
        if isinstance(module, nn.Linear)
    ]


def trained_modules(model: PreTrainedModel, layers: Sequence[int]) -> dict[str, nn.Module]:
    """The experts of some layers, shared and routed, by their names in the model; no router, no gate."""
    found: dict[str, nn.Module] = {}
    for layer in layers:
        block = get_block(model, layer)
        if isinstance(block, CondensedMoE):
            parts: dict[str, nn.Module] = {name: getattr(block, name) for name in ("gate_proj", "up_proj", "down_proj")}
        else:
            parts = expert_modules(model, layer)
        found |= {f"{block_name(layer)}.{name}": part for name, part in parts.items()}
    return found


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


def stock_updates(
    config: PretrainedConfig, widths: dict[int, int], skipped: Collection[int], num_experts: int | None
) -> dict[str, object] | None:
    """Config updates with which the stock class holds a compressed model; None if it cannot.

    Args:
        widths: of condensed layers without a gate per token.
        skipped: decoder layers that are gone; those after them move up.
        num_experts: of every sparse layer, if that changed.
    """
    family = family_of(config)
    updates: dict[str, object] = {}
    if widths:
        dense = None if skipped else family.dense_layers(config, widths)
        if dense is None:
            return None
        updates |= dense
    if skipped:
        fewer = _without_layers(config, skipped)
        if fewer is None:
            return None
        updates |= fewer
    if num_experts is not None:
        updates[family.num_experts] = num_experts
    return updates


def layer_prefix(layer: int) -> str:
    """The state-dict prefix of a decoder layer, with the last dot."""
    return f"model.layers.{layer}."


def without_router_loss(model: PreTrainedModel) -> None:
    """Switch off the router's auxiliary loss: transformers' forward fails on it once no routed layer is left."""
    model.config.output_router_logits = False
