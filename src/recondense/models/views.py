"""Views of MoE blocks: routers and experts of every family under the same names.

Legend: E routed experts, D hidden size, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense.errors import UserError
from recondense.models import deepseek
from recondense.models.blocks import CondensedMoE, MoEWeights, RemappedRouter, SkippedLayer, Zeros, shallow_copy, sliced
from recondense.models.compressed import gives_pair, glu_of, has_bias, router_name
from recondense.models.decoder import decoder_layers
from recondense.models.families import Family, Routing, family_of
from recondense.models.low_rank import LowRankExperts
from recondense.operations import PROJECTIONS

deepseek.register()


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


def is_dense(block: nn.Module) -> bool:
    """Whether this is a dense layer's block, of a family's own class."""
    own = isinstance(block, (CondensedMoE, Zeros)) or is_sparse(block)
    return not own and all(hasattr(block, name) for name in PROJECTIONS)


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
