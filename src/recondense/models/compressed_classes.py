"""The classes of compressed models: a family's own classes with different shapes in some layers.

This file imports only torch, transformers and the modules of blocks, which become the modeling file of exports.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from recondense.models.constant_experts import add_constants
from recondense.models.expert_widths import first_channels, fused_width
from recondense.models.low_rank import LowRankExperts
from recondense.models.removed_blocks import SkippedLayer, Zeros
from recondense.models.replacement_blocks import (
    GLU,
    ClampedGLU,
    CondensedMoE,
    Glu,
    RemappedRouter,
    select_experts,
)

# Compressed models have their own model_type, because the stock one would load the stock class with missing weights.
PREFIX = "recondense_"


def compressed_classes(
    config_class: type[PretrainedConfig],
    model_class: type[PreTrainedModel],
    base_class: type[PreTrainedModel],
    router_entries: Sequence[str],
    expert_entries: Sequence[str],
) -> tuple[type[PretrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]:
    """Make the classes of a family's compressed models, whose layers have the shapes in `config.compressed_layers`.

    Args:
        config_class, model_class, base_class: the family's own classes; the base class has no head.
        router_entries, expert_entries: names of the tensors of a router and of an experts module that have one entry
            per expert.

    Returns:
        Classes named CompressedConfig, CompressedForCausalLM and CompressedModel. Their checkpoints use the family's
        key names. CompressedModel is for vLLM, which adds its own head.
    """
    name = PREFIX + config_class.model_type
    mapping = get_checkpoint_conversion_mapping(config_class.model_type) or []
    register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
    # transformers searches the source file of a class for its decorator, but the experts are defined elsewhere.
    can_set_experts = classmethod(lambda cls: bool(model_class._can_set_experts_implementation()))

    class CompressedConfig(config_class):  # type: ignore[valid-type,misc]
        model_type = name

    class CompressedForCausalLM(model_class):  # type: ignore[valid-type,misc]
        config_class = CompressedConfig
        _can_set_experts_implementation = can_set_experts

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            for layer, shape in config.compressed_layers.items():
                reshape(self.model.layers, int(layer), config.hidden_size, router_entries, expert_entries, **shape)
            self.post_init()

    class CompressedModel(base_class):  # type: ignore[valid-type,misc]
        config_class = CompressedConfig
        _can_set_experts_implementation = can_set_experts

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            for layer, shape in config.compressed_layers.items():
                reshape(self.layers, int(layer), config.hidden_size, router_entries, expert_entries, **shape)
            self.post_init()

    for compressed in (CompressedConfig, CompressedForCausalLM, CompressedModel):
        compressed.__qualname__ = compressed.__name__
    return CompressedConfig, CompressedForCausalLM, CompressedModel


class _Kept(nn.Module):
    """Makes experts that vLLM does not replace, together with a class of experts.

    vLLM 0.32 (transformers/moe.py) replaces every child named `experts` whose parameters are all 3-D by its own
    experts of the config's width, and then silently loads none of the factors. An additional empty vector among the
    parameters prevents that.
    """

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        yield from super().parameters(recurse)
        yield nn.Parameter(torch.empty(0), requires_grad=False)


class _KeptExperts(_Kept, LowRankExperts):
    """Experts of different shapes."""


def _first_channels(experts: nn.Module, width: int) -> nn.Module:
    """Return fused experts of a smaller width that vLLM does not replace."""
    narrow = first_channels(experts, width)
    narrow.__class__ = type(type(experts).__name__, (_Kept, type(experts)), {})
    return narrow


def reshape(
    layers: nn.ModuleList,
    index: int,
    hidden_size: int,
    router_entries: Sequence[str],
    expert_entries: Sequence[str],
    kind: str,
    **shape: Any,
) -> None:
    """Change a decoder layer of the uncompressed model to a compressed shape, without filling in weights.

    Args:
        layers: the decoder layers of the model.
        index: the layer to change.
        hidden_size: D.
        router_entries, expert_entries: as for `compressed_classes`.
        kind: "sparse", "condensed", "zeros" or "skipped". This and the following arguments are one entry of
            `config.compressed_layers`.
        shape: the arguments of `_reshape_sparse` for a sparse layer; `shared_width`, `routed_width` and `token_gate`
            of a condensed layer.
    """
    layer: Any = layers[index]
    if kind == "skipped":
        layers[index] = SkippedLayer.instead_of(layer)
        return
    block = layer.mlp
    pair = returns_pair(block)
    if kind == "zeros":
        layer.mlp = Zeros(pair)
    elif kind == "condensed":
        glu, bias = glu_of(block.experts), has_bias(block.experts)
        layer.mlp = CondensedMoE(hidden_size, glu=glu, scaled=False, bias=bias, pair=pair, **shape)
    else:
        _reshape_sparse(block, hidden_size, router_entries, expert_entries, **shape)


def _reshape_sparse(
    block: Any,
    hidden_size: int,
    router_entries: Sequence[str],
    expert_entries: Sequence[str],
    num_experts: int = 0,
    router_rows: int = 0,
    expert_width: int | list[int] | None = None,
    ranks: Mapping[str, list[int | None]] | None = None,
    merged: bool = False,
    constants: int = 0,
) -> None:
    """Change the router and the experts of a sparse block to a compressed shape.

    Args:
        block: the sparse block.
        hidden_size, router_entries, expert_entries: as for `reshape`.
        num_experts: the number of routed experts.
        router_rows: the number of rows of the router.
        expert_width: the width of the experts, or one width per expert; None for the original one.
        ranks: the ranks of low-rank experts; None for dense ones.
        merged: whether a table says what each row selects, because several rows share an expert, or for constants.
        constants: the number of constants in place of experts.
    """
    experts, name = block.experts, router_name(block)
    router, before = getattr(block, name), experts.num_experts
    if router_rows != before:
        router = select_experts(router, range(router_rows), before, router_entries)
    block.experts = _reshaped_experts(experts, hidden_size, num_experts, expert_width, ranks, expert_entries)
    if constants:
        block.experts = add_constants(block.experts, torch.empty(constants, hidden_size))
    setattr(block, name, RemappedRouter(router, torch.zeros(router_rows, dtype=torch.int64)) if merged else router)


def _reshaped_experts(
    experts: Any,
    hidden_size: int,
    num_experts: int,
    expert_width: int | list[int] | None,
    ranks: Mapping[str, list[int | None]] | None,
    expert_entries: Sequence[str],
) -> nn.Module:
    """Return experts of another shape than the uncompressed ones; the arguments are those of `_reshape_sparse`."""
    width = fused_width(experts) if expert_width is None else expert_width
    if ranks is not None or isinstance(width, list):
        dense = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), [None] * num_experts)
        return _KeptExperts(hidden_size, width, ranks or dense, glu_of(experts), has_bias(experts))
    if num_experts != experts.num_experts:
        experts = select_experts(experts, range(num_experts), experts.num_experts, expert_entries)
    return _first_channels(experts, width) if width != fused_width(experts) else experts  # type: ignore[no-any-return]


def router_name(block: nn.Module) -> str:
    """Return the name of a sparse block's attribute that is its router."""
    return "gate" if hasattr(block, "gate") else "router"


def returns_pair(block: nn.Module) -> bool:
    """Return whether a block returns its output together with its router's scores, like that of gpt_oss."""
    return hasattr(block, "router") or bool(getattr(block, "pair", False))


def glu_of(experts: Any) -> Glu:
    """Return the gated activation of fused experts."""
    return ClampedGLU(experts.alpha, experts.limit) if hasattr(experts, "alpha") else GLU(experts.act_fn)


def has_bias(experts: nn.Module) -> bool:
    """Return whether the projections of fused experts have biases."""
    return hasattr(experts, "gate_up_proj_bias")
