"""Views of MoE blocks, which give the routers and experts of every family the same names.

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
from recondense.models.compressed_classes import glu_of, has_bias, returns_pair, router_name
from recondense.models.decoder import decoder_layers, is_norm
from recondense.models.expert_widths import fused_width
from recondense.models.families import Family, family_of
from recondense.models.low_rank import LowRankExperts
from recondense.models.removed_blocks import SkippedLayer, Zeros
from recondense.models.replacement_blocks import (
    CondensedMoE,
    MoEWeights,
    RemappedRouter,
    select_experts,
    shallow_copy,
)
from recondense.models.routing import Routing
from recondense.operations import PROJECTIONS


@dataclass(frozen=True)
class SparseBlock:
    """A view of one sparse MoE block. It refers to the block's own modules and tensors, never to copies."""

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
        """The weights of the routed and shared experts: gate_up (E, 2F, D), down (E, D, F).

        Raises:
            UserError: the experts are factorized or have different widths, or some are constants.
        """
        if hasattr(self.experts, "constants"):
            raise UserError(f"layer {self.layer}: some of its experts are already constants; put this step before that")
        return self.fused_weights

    @property
    def fused_weights(self) -> MoEWeights:
        """The weights of those experts that have weights.

        Raises:
            UserError: the experts are factorized or have different widths.
        """
        if not hasattr(self.experts, "gate_up_proj"):
            if not cast(LowRankExperts, self.experts).factorized:
                raise UserError(
                    f"layer {self.layer}: its experts have different widths; put this step before the narrowing, or "
                    "give them one width"
                )
            raise UserError(f"layer {self.layer}: its experts are already factorized; put this step before factorizing")
        shared, experts = self.shared_expert, cast(Any, self.experts)
        transposed, bias = getattr(experts, "is_transposed", False), has_bias(experts)
        return MoEWeights(
            gate_up_EHD=experts.gate_up_proj.transpose(1, 2) if transposed else experts.gate_up_proj,
            down_EDF=experts.down_proj.transpose(1, 2) if transposed else experts.down_proj,
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

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of channels of each expert."""
        if isinstance(self.experts, LowRankExperts):
            return self.experts.widths
        return (fused_width(self.experts),) * self.num_experts

    def require_experts(self, experts: Sequence[int], kind: str) -> None:
        """Check that the layer has some experts.

        Args:
            experts: the indices of the experts.
            kind: the kind of the operation that names them.

        Raises:
            UserError: some do not exist; the message names them.
        """
        missing = [expert for expert in experts if expert >= self.num_experts]
        if missing:
            raise UserError(
                f"plan: {kind}, layer {self.layer}: the plan retains experts {missing}, but the layer has "
                f"{self.num_experts} routed experts"
            )

    def select_experts(self, index: Sequence[int]) -> nn.Module:
        """Return a copy of the experts module with only some of the experts."""
        return select_experts(self.experts, index, self.num_experts, self.family.expert_entries)

    @property
    def pair(self) -> bool:
        """Whether the block returns its output together with its router's scores."""
        return returns_pair(self.module)

    @property
    def correction_E(self) -> Tensor | None:
        """The correction bias (E,), which is added to the scores for the selection only; None without one."""
        bias: Any = getattr(self.router, "e_score_correction_bias", None)
        if bias is None and hasattr(self.router, "moe_statics"):
            bias = cast(Any, self.router.moe_statics).e_score_correction_bias
        return None if bias is None else bias.detach().flatten()


def selects_experts(name: str) -> bool:
    """Return whether a parameter of this name is a correction bias, which affects only the selection of experts."""
    return name.endswith("e_score_correction_bias")


def is_norm_or_bias(module: nn.Module, name: str) -> bool:
    """Return whether a parameter of this name in a module is a norm's weight or a bias, such as a constant expert."""
    parent, _, leaf = name.rpartition(".")
    return leaf.endswith("bias") or leaf == "constants" or is_norm(module.get_submodule(parent))


def get_block(model: PreTrainedModel, layer: int) -> nn.Module:
    """Return the MoE block or MLP of a decoder layer, which surgery changes; `SkippedLayer` for a removed layer."""
    return block_of(decoder_layers(model)[layer])


def block_of(decoder_layer: nn.Module) -> nn.Module:
    """Return the MoE block or MLP of a decoder layer; a removed layer itself."""
    return decoder_layer if isinstance(decoder_layer, SkippedLayer) else decoder_layer.mlp  # type: ignore[return-value]


def set_block(model: PreTrainedModel, layer: int, block: nn.Module) -> None:
    """Set the MoE block or MLP of a decoder layer. If `block` is a decoder layer, it replaces the layer itself."""
    if is_decoder_layer(block):
        decoder_layers(model)[layer] = block
    else:
        decoder_layers(model)[layer].mlp = block


def is_decoder_layer(block: nn.Module) -> bool:
    """Return whether a module in the place of a block is a decoder layer."""
    return isinstance(block, SkippedLayer) or hasattr(block, "self_attn")


def is_sparse(block: nn.Module) -> bool:
    return hasattr(block, "experts") and hasattr(block, router_name(block))


def block_output(returned: Any) -> Tensor:
    """Return the hidden states from a block's return value, without the router's scores of some families."""
    return returned[0] if isinstance(returned, tuple) else returned


def replace_parts(block: nn.Module, router: nn.Module | None = None, experts: nn.Module | None = None) -> nn.Module:
    """Return a copy of a sparse block with another router or other experts; everything else is shared."""
    duplicate = shallow_copy(block)
    if router is not None:
        setattr(duplicate, router_name(duplicate), router)
    if experts is not None:
        duplicate.experts = experts
    return duplicate


def pruned_router(block: SparseBlock, retained: Sequence[int]) -> nn.Module:
    """Return a copy of the router with only the rows of the retained experts.

    Raises:
        UserError: fewer than top_k experts are retained; the experts are merged; or the groups would have different
            sizes or fewer than two experts.
    """
    routing, num_experts = block.routing, block.num_experts
    if isinstance(block.router, RemappedRouter):
        raise UserError(f"layer {block.layer}: its experts are merged and can no longer be pruned")
    if len(retained) < routing.top_k:
        raise UserError(
            f"layer {block.layer}: {len(retained)} experts are retained, but each token selects {routing.top_k}; "
            "retain at least as many"
        )
    if routing.num_groups > 1:
        size = num_experts // routing.num_groups
        sizes = [sum(expert // size == group for expert in retained) for group in range(routing.num_groups)]
        if len(set(sizes)) > 1 or sizes[0] < 2:
            raise UserError(
                f"layer {block.layer}: the router selects {routing.top_groups} of {routing.num_groups} groups first; "
                f"pruning would leave groups of {sizes} experts, but all groups need the same number, at least 2"
            )
    return select_experts(block.router, retained, num_experts, block.family.router_entries)


def masked_block(block: SparseBlock, retained: Sequence[int]) -> nn.Module:
    """Return a block that computes the same as the pruned block but shares the experts, for trials.

    Raises:
        UserError: the experts cannot be pruned; see `pruned_router`.
    """
    table = torch.as_tensor(retained, device=next(block.experts.parameters()).device)
    return replace_parts(block.module, router=RemappedRouter(pruned_router(block, retained), table))


def expert_modules(model: PreTrainedModel, layer: int) -> dict[str, nn.Module]:
    """Return the routed and shared experts of a sparse layer by their names in its block; empty for other layers."""
    if not is_sparse(get_block(model, layer)):
        return {}
    block = sparse_view(model, layer, get_block(model, layer))
    modules = {"experts": block.experts}
    if block.shared_expert is not None:
        modules[str(block.family.shared_expert)] = block.shared_expert
    return modules


def router_modules(model: PreTrainedModel, layer: int) -> dict[str, nn.Module]:
    """Return a sparse layer's router and the gate of its shared experts by their names in its block.

    Other layers, also condensed ones, have none.
    """
    module = get_block(model, layer)
    if not is_sparse(module):
        return {}
    block = sparse_view(model, layer, module)
    gate = block.shared_expert_gate
    gates = {} if gate is None else {str(block.family.shared_expert_gate): gate}
    return {router_name(module): block.router, **gates}


def block_name(layer: int) -> str:
    """Return the state-dict name of a decoder layer's MoE block or MLP."""
    return f"model.layers.{layer}.mlp"


def sparse_view(model: PreTrainedModel, layer: int, module: nn.Module) -> SparseBlock:
    """Return a view of a sparse block that belongs or belonged to this layer of the model."""
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
    """Return views of the current sparse layers by decoder-layer index, ascending."""
    blocks = {layer: get_block(model, layer) for layer in range(len(decoder_layers(model)))}
    return {layer: sparse_view(model, layer, block) for layer, block in blocks.items() if is_sparse(block)}


@contextmanager
def swap_blocks(model: PreTrainedModel, blocks: Mapping[int, nn.Module]) -> Iterator[PreTrainedModel]:
    """Replace blocks or decoder layers of the model inside the context; no weight is copied."""
    before = {
        layer: decoder_layers(model)[layer] if is_decoder_layer(block) else get_block(model, layer)
        for layer, block in blocks.items()
    }
    for layer, block in blocks.items():
        set_block(model, layer, block)
    try:
        yield model
    finally:
        for layer, block in before.items():
            set_block(model, layer, block)


def is_dense(block: nn.Module) -> bool:
    """Return whether a block is the MLP of one of the family's own dense layers."""
    ours = isinstance(block, (CondensedMoE, Zeros))
    return not ours and not is_sparse(block) and all(hasattr(block, name) for name in PROJECTIONS)


def multiply_factors(experts: LowRankExperts, *, transposed: bool) -> dict[str, Tensor]:
    """Multiply out low-rank experts into the parameters of the family's fused experts, by name.

    Args:
        experts: the low-rank experts.
        transposed: whether the family stores the weights transposed, with gate and up interleaved, like gpt_oss.

    Returns:
        gate_up_proj, down_proj and any biases, in the factors' dtype.
    """
    number, width, hidden_size = experts.num_experts, experts.widths[0], experts.hidden_dim
    like = next(experts.parameters())
    both, down = like.new_empty(number, 2 * width, hidden_size), like.new_empty(number, hidden_size, width)
    biases = {
        "gate_up_proj_bias": like.new_empty(number, 2 * width),
        "down_proj_bias": like.new_empty(number, hidden_size),
    }
    gate_rows, up_rows = (slice(0, None, 2), slice(1, None, 2)) if transposed else (slice(width), slice(width, None))
    for expert in range(number):
        bucket, position = experts.place_of(expert)
        both[expert, gate_rows] = bucket.projection(position, "gate_proj").to(like.dtype)
        both[expert, up_rows] = bucket.projection(position, "up_proj").to(like.dtype)
        down[expert] = bucket.projection(position, "down_proj").to(like.dtype)
        if experts.bias:
            gate_bias, up_bias, down_bias = (bias[position] for bias in bucket.biases() or ())
            biases["gate_up_proj_bias"][expert, gate_rows] = gate_bias
            biases["gate_up_proj_bias"][expert, up_rows] = up_bias
            biases["down_proj_bias"][expert] = down_bias
    fused = {"gate_up_proj": both.mT, "down_proj": down.mT} if transposed else {"gate_up_proj": both, "down_proj": down}
    return {**fused, **(biases if experts.bias else {})}
