"""Uniform views of MoE layers: with layouts.py and bundle.py the only place that knows Hugging Face attribute names.

A family's experts are fused: `experts.gate_up_proj` (E, 2F, D) and `experts.down_proj` (E, D, F) (in gpt_oss
transposed, gate and up interleaved, with biases), and its router returns (logits, top_k_weights, top_k_index).

Legend: E routed experts, D hidden size, F expert width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from recondense import deepseek
from recondense.bundle import PREFIX, compressed_classes, gives_pair, glu_of, has_bias, router_name
from recondense.chunking import Head
from recondense.errors import UserError
from recondense.layouts import (
    FAMILIES,
    PER_LAYER,
    Facts,
    Family,
    Routing,
    compressed_layers,
    dense_widths,
    facts,
    family_name,
    family_of,
    original_facts,
    stock_updates,
)
from recondense.low_rank import LowRankExperts
from recondense.modules import CondensedMoE, MoEWeights, RemappedRouter, SkippedLayer, Zeros, shallow_copy, sliced
from recondense.operations import PROJECTIONS

__all__ = [
    "FAMILIES",
    "PER_LAYER",
    "PREFIX",
    "Facts",
    "Family",
    "Routing",
    "SparseBlock",
    "compressed_layers",
    "dense_widths",
    "facts",
    "family_name",
    "family_of",
    "gives_pair",
    "original_facts",
    "stock_updates",
]

deepseek.register()


@dataclass(frozen=True)
class Counts:
    """Parameters of the model that a config describes.

    Args:
        total: of the whole model, tied ones once.
        routed_experts: of all routed experts, those in condensed layers included.
        expert: of one whole routed expert, 3·D·F and its biases.
        router_row: of one expert's row in the router.
    """

    total: int
    routed_experts: int
    expert: int
    router_row: int


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
    family: Family

    @property
    def weights(self) -> MoEWeights:
        """The layer's own tensors; gate_up (E, 2F, D), down (E, D, F).

        Raises:
            UserError: the experts are factorized.
        """
        if not hasattr(self.experts, "gate_up_proj"):
            raise UserError(f"layer {self.layer}: its experts are factorized; this needs whole ones, so do it before")
        shared, experts = self.shared_expert, cast(Any, self.experts)
        turned, bias = getattr(experts, "is_transposed", False), has_bias(experts)
        return MoEWeights(
            gate_up_EHD=experts.gate_up_proj.transpose(1, 2) if turned else experts.gate_up_proj,
            down_EDF=experts.down_proj.transpose(1, 2) if turned else experts.down_proj,
            glu=glu_of(experts),
            interleaved=not getattr(experts, "is_concatenated", True),
            gate_up_bias_EH=experts.gate_up_proj_bias if bias else None,
            down_bias_ED=experts.down_proj_bias if bias else None,
            shared=None if shared is None else tuple(getattr(shared, name).weight for name in PROJECTIONS),  # type: ignore[arg-type]
            shared_gate=None if self.shared_expert_gate is None else self.shared_expert_gate.weight,  # type: ignore[arg-type]
        )

    @property
    def num_experts(self) -> int:
        return int(self.experts.num_experts)  # type: ignore[arg-type]

    def chosen_experts(self, index: Sequence[int]) -> nn.Module:
        """The experts module with some experts only, in fresh tensors."""
        return sliced(self.experts, index, self.num_experts, self.family.expert_entries)

    @property
    def pair(self) -> bool:
        """Whether the block hands out its router's scores beside its output."""
        return gives_pair(self.module)

    @property
    def expert_size(self) -> int:
        """Parameters of one routed expert, the mean of them where ranks differ."""
        return sum(parameter.numel() for parameter in self.experts.parameters()) // self.num_experts

    @property
    def router_row(self) -> int:
        """Parameters of one expert's row in the router."""
        return sum(parameter.numel() for parameter in self.router.parameters()) // self.num_experts

    @property
    def correction_E(self) -> Tensor | None:
        """What is added to the experts' scores while the top_k are selected, and to no weight; None without it."""
        found: Any = getattr(self.router, "e_score_correction_bias", None)
        if found is None and hasattr(self.router, "moe_statics"):
            found = cast(Any, self.router.moe_statics).e_score_correction_bias
        return None if found is None else found.detach().flatten()


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


def device(model: PreTrainedModel) -> torch.device:
    """Where the model computes: where its embedding lies."""
    return model.get_input_embeddings().weight.device  # type: ignore[return-value,union-attr]


class _Taken(nn.Module):
    """Stands in for a decoder layer, and keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.hidden_states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not args, "a decoder layer is called with more than its hidden states by position"
        self.arguments, self.hidden_states = kwargs, hidden_states
        return hidden_states


def arguments_of_layers(model: PreTrainedModel, arguments: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Tensor]:
    """What the decoder calls each of its layers with besides hidden states, and what enters the first (B, S, D).

    No layer runs. With ids alone the former is the same for all of one shape.

    Args:
        arguments: of the model.
    """
    layers = decoder_layers(model)
    taken = [_Taken() for _ in layers]
    decoder(model).layers = nn.ModuleList(taken)
    try:
        decoder(model)(**{**arguments, "use_cache": False})
    finally:
        decoder(model).layers = layers
    assert taken[0].hidden_states is not None
    return [each.arguments for each in taken], taken[0].hidden_states


@contextmanager
def headless(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside, the model's logits are its hidden states after the final norm.

    It is still called as a whole: engines that shard it hang their hooks on it.
    """
    head = model.lm_head
    model.lm_head = nn.Identity()
    try:
        yield model
    finally:
        model.lm_head = head


@contextmanager
def gathered(model: PreTrainedModel) -> Iterator[Head]:
    """The weights of the LM head, for use inside.

    Where an engine spreads them: under FSDP2 they lie in the root unit, which is gathered for the whole of a step;
    ZeRO-3 gathers a weight when a module's attribute is read, and lets go of it with the root.
    """
    head: Any = model.lm_head
    yield Head(head.weight, head.bias)


@contextmanager
def checkpointing(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Inside, decoder layers in training keep what enters them alone, and backward computes the rest again."""
    if wanted:
        model.activation_checkpointing_enable()
    try:
        yield
    finally:
        if wanted:
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()  # transformers does so for peft's models alone


@contextmanager
def eager_experts(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Inside, fused experts are computed one after another."""
    before = model.get_experts_implementation()
    if wanted:
        model.set_experts_implementation("eager")
    try:
        yield
    finally:
        if wanted:
            model.set_experts_implementation(before)


def selects_experts(name: str) -> bool:
    """Whether a parameter, by its name, corrects which experts are selected; it enters no output."""
    return name.endswith("e_score_correction_bias")


def is_norm_or_bias(module: nn.Module, name: str) -> bool:
    """Whether a parameter, by its name in a module, is a norm's or is added to something, as correction biases are."""
    parent, _, leaf = name.rpartition(".")
    return leaf.endswith("bias") or "norm" in type(module.get_submodule(parent)).__name__.lower()


@contextmanager
def compiling(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Inside, decoder layers are compiled, each for every block that stands in it."""
    if not wanted:
        yield
        return
    layers = [layer for layer in decoder_layers(model) if not isinstance(layer, SkippedLayer)]
    for layer in layers:
        layer.compile()
    try:
        # All layers are one piece of code to the compiler: with the teacher's blocks, the student's, and gradients or
        # none it needs more versions than it would keep.
        with torch._dynamo.config.patch(recompile_limit=8 + 8 * len(layers)):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def random_in_training(config: PretrainedConfig) -> bool:
    """Whether a model computes otherwise in training than in evaluation: dropout, or noise on its routers."""
    values = config.to_dict()
    return any(bool(values[name]) for name in values if "dropout" in name or "jitter" in name)


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
    return hasattr(block, "experts") and hasattr(block, router_name(block))


def output_of(returned: Any) -> Tensor:
    """What a block adds to the residual stream; some families' blocks return their router's scores beside it."""
    return returned[0] if isinstance(returned, tuple) else returned


def with_parts(block: nn.Module, router: nn.Module | None = None, experts: nn.Module | None = None) -> nn.Module:
    """A sparse block with another router or other experts; everything else is shared with the given one."""
    twin = shallow_copy(block)
    if router is not None:
        setattr(twin, router_name(twin), router)
    if experts is not None:
        twin.experts = experts
    return twin


def pruned_router(block: SparseBlock, retained: Sequence[int]) -> nn.Module:
    """The router with the rows of some experts only.

    Raises:
        UserError: fewer experts than top_k, merged experts, or groups of unequal size or of fewer than two.
    """
    routing, num_experts = block.routing, block.num_experts
    if isinstance(block.router, RemappedRouter):
        raise UserError(f"layer {block.layer}: its experts are merged, so they cannot be pruned any more")
    if len(retained) < routing.top_k:
        raise UserError(
            f"layer {block.layer}: {len(retained)} experts retained, but each token selects {routing.top_k}; retain at "
            "least as many"
        )
    if routing.num_groups > 1:
        size = num_experts // routing.num_groups
        sizes = [sum(expert // size == group for expert in retained) for group in range(routing.num_groups)]
        if len(set(sizes)) > 1 or sizes[0] < 2:
            raise UserError(
                f"layer {block.layer}: the router selects {routing.top_groups} of {routing.num_groups} groups first; "
                f"pruning would leave groups of {sizes} experts, which must be equal and at least 2"
            )
    return sliced(block.router, retained, num_experts, block.family.router_entries)


def masked_block(block: SparseBlock, retained: Sequence[int]) -> nn.Module:
    """The block as pruning would leave it, without a copy of any expert: for trying it out.

    Raises:
        UserError: as `pruned_router`.
    """
    table = torch.as_tensor(retained, device=next(block.experts.parameters()).device)
    return with_parts(block.module, router=RemappedRouter(pruned_router(block, retained), table))


@cache
def _counts(text: str, kind: type[PretrainedConfig]) -> Counts:
    model = on_meta(kind.from_dict(json.loads(text)))
    found = original_facts(model.config)
    view = next(iter(sparse_blocks(model).values()), None)
    bias = view is not None and has_bias(view.experts)
    return Counts(
        total=sum(parameter.numel() for parameter in model.parameters()),
        routed_experts=routed_parameters(model),
        expert=3 * found.hidden_size * found.expert_width + (2 * found.expert_width + found.hidden_size) * bias,
        router_row=0 if view is None else view.router_row,
    )


def parameter_counts(config: PretrainedConfig) -> Counts:
    """Parameters of the model that a config describes; built on the meta device, without weights.

    Raises:
        UserError: as `facts`.
    """
    return _counts(json.dumps(config.to_dict(), sort_keys=True, default=str), type(config))  # type: ignore[arg-type]


def on_meta(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model that a config describes, without weights.

    Raises:
        UserError: as `family_of`.
    """
    family_of(config)
    return empty_model(config, dtype)


def empty_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model that a config describes, of a supported family or not, without weights."""
    register_compressed(config.model_type)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **({"dtype": dtype} if dtype else {}))
    return model


def routed_parameters(model: PreTrainedModel) -> int:
    """Parameters of the routed experts as they are now; those in condensed layers count as retained."""
    sparse = sum(
        parameter.numel() for block in sparse_blocks(model).values() for parameter in block.experts.parameters()
    )
    blocks = [get_block(model, layer) for layer in range(len(decoder_layers(model)))]
    return sparse + sum(_routed_of(block) for block in blocks if isinstance(block, CondensedMoE))


def _routed_of(block: CondensedMoE) -> int:
    """Parameters of a condensed layer that came from routed experts."""
    width, hidden_size = block.routed_width, block.down_proj.out_features
    bias = 2 * width + hidden_size if block.down_proj.bias is not None and width else 0
    return width * 3 * hidden_size + bias


@cache
def register_compressed(model_type: str) -> None:
    """Let transformers' Auto classes know what compressed folders of a family are loaded into, without remote code."""
    if not model_type.startswith(PREFIX):
        return
    family = FAMILIES[family_name(model_type)]
    config_class = type(AutoConfig.for_model(family_name(model_type)))
    model_class, base = model_class_of(config_class), base_class_of(config_class)
    compressed_config, compressed_model, compressed_base = compressed_classes(
        config_class, model_class, base, family.router_entries, family.expert_entries
    )
    AutoConfig.register(model_type, compressed_config, exist_ok=True)
    AutoModelForCausalLM.register(compressed_config, compressed_model, exist_ok=True)
    AutoModel.register(compressed_config, compressed_base, exist_ok=True)


def model_class_of(config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """The causal LM of a config class."""
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[config_class])


def base_class_of(config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """The model without a head of a config class."""
    return cast(type[PreTrainedModel], MODEL_MAPPING[config_class])


def has_attention(config: PretrainedConfig, name: str) -> bool:
    """Whether a config's model has an attention implementation."""
    needed = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}.get(name)
    return needed is None or bool(getattr(own_classes(config)[1], needed))


def own_classes(config: PretrainedConfig) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Config class and causal LM of the family's own, whatever was compressed before."""
    config_class = type(AutoConfig.for_model(family_name(config.model_type)))
    return config_class, model_class_of(config_class)


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
        router=getattr(module, router_name(module)),
        experts=module.experts,  # type: ignore[arg-type]
        shared_expert=getattr(module, family.shared_expert or "", None),
        shared_expert_gate=getattr(module, family.shared_expert_gate or "", None),
        routing=family.routing(model.config),
        family=family,
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


def masks_of_types(model: PreTrainedModel, input_ids_BS: Tensor, position_ids_BS: Tensor) -> dict[str, Any] | None:
    """Attention masks by kind of layer that keep packed examples apart, where the family needs them ready made."""
    if not family_of(model.config).masks_of_types:
        return None
    shape = torch.empty(*input_ids_BS.shape, 0, dtype=model.dtype, device=input_ids_BS.device)
    settings: dict[str, Any] = {
        "config": model.config, "inputs_embeds": shape, "attention_mask": None, "past_key_values": None,
        "position_ids": position_ids_BS,
    }  # fmt: skip
    return {
        "full_attention": create_causal_mask(**settings),
        "sliding_attention": create_sliding_window_causal_mask(**settings),
    }


def attention_linears(model: PreTrainedModel) -> list[str]:
    """Names of the Linear layers of every decoder layer's attention."""
    return [
        f"model.layers.{index}.self_attn.{name}"
        for index, layer in enumerate(decoder_layers(model))
        if not isinstance(layer, SkippedLayer)
        for name, module in layer.self_attn.named_modules()  # type: ignore[union-attr]
        if isinstance(module, nn.Linear)
    ]


def is_dense(block: nn.Module) -> bool:
    """Whether this is a dense layer's block, of a family's own class."""
    own = isinstance(block, (CondensedMoE, Zeros)) or is_sparse(block)
    return not own and all(hasattr(block, name) for name in PROJECTIONS)


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


def multiplied_out(experts: LowRankExperts, *, turned: bool) -> dict[str, Tensor]:
    """Low-rank experts as a family's fused ones, by parameter name, in the factors' dtype; one expert at a time.

    Args:
        turned: as gpt_oss has them: transposed, gate and up interleaved.
    """
    number, width, hidden_size = experts.num_experts, experts.intermediate_dim, experts.hidden_dim
    like = next(experts.parameters())
    both, down = like.new_empty(number, 2 * width, hidden_size), like.new_empty(number, hidden_size, width)
    added = {
        "gate_up_proj_bias": like.new_empty(number, 2 * width),
        "down_proj_bias": like.new_empty(number, hidden_size),
    }
    gate_rows, up_rows = (slice(0, None, 2), slice(1, None, 2)) if turned else (slice(width), slice(width, None))
    for expert in range(number):
        bucket, position = experts.place_of(expert)
        both[expert, gate_rows] = bucket.projection(position, "gate_proj").to(like.dtype)
        both[expert, up_rows] = bucket.projection(position, "up_proj").to(like.dtype)
        down[expert] = bucket.projection(position, "down_proj").to(like.dtype)
        if experts.bias:
            gate_bias, up_bias, down_bias = (bias[position] for bias in bucket.biases() or ())
            added["gate_up_proj_bias"][expert, gate_rows] = gate_bias
            added["gate_up_proj_bias"][expert, up_rows] = up_bias
            added["down_proj_bias"][expert] = down_bias
    fused = {"gate_up_proj": both.mT, "down_proj": down.mT} if turned else {"gate_up_proj": both, "down_proj": down}
    return {**fused, **(added if experts.bias else {})}


def layers_prefix() -> str:
    """What the state-dict names of all decoder layers begin with."""
    return "model.layers."


def layer_prefix(layer: int) -> str:
    """The state-dict prefix of a decoder layer, with the last dot."""
    return f"model.layers.{layer}."


def without_router_loss(model: PreTrainedModel) -> None:
    """Switch off the router's auxiliary loss: transformers' forward fails on it once no routed layer is left."""
    model.config.output_router_logits = False
