"""The classes that compressed folders are loaded into: a family's own class with other shapes in some layers.

Imports torch and transformers, `blocks` and `low_rank`: together with those it is the modeling file of exports.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from recondense.models.low_rank import LowRankExperts
from recondense.models.replacement_blocks import (
    GLU,
    ClampedGLU,
    CondensedMoE,
    Glu,
    RemappedRouter,
    SkippedLayer,
    Zeros,
    select_experts,
)

# A model_type of its own: a stock one would load the stock class with missing weights.
PREFIX = "recondense_"


def compressed_classes(
    config_class: type[PretrainedConfig],
    model_class: type[PreTrainedModel],
    base_class: type[PreTrainedModel],
    router_entries: Sequence[str],
    expert_entries: Sequence[str],
) -> tuple[type[PretrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]:
    """Config, causal LM and its base of a family, with layers as `config.compressed_layers` describes them.

    Args:
        config_class, model_class, base_class: the family's own; the base has no head.
        router_entries, expert_entries: tensors of a router and of an experts module with an entry for each expert.

    Returns:
        classes named CompressedConfig, CompressedForCausalLM and CompressedModel, whose checkpoints have the family's
        key names. vLLM adds a head of its own to the last.
    """
    name = PREFIX + config_class.model_type
    mapping = get_checkpoint_conversion_mapping(config_class.model_type) or []
    register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
    # transformers looks for its decorator in the source of the class, and the experts are not in this source.
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


class _KeptExperts(LowRankExperts):
    """Low-rank experts that vLLM does not replace.

    vLLM 0.32 (transformers/moe.py) replaces every child named `experts` whose parameters are all 3-D by its own
    experts, and then loads none of the factors, without an error. An empty vector among the parameters prevents that.
    """

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        yield from super().parameters(recurse)
        yield nn.Parameter(torch.empty(0), requires_grad=False)


def reshape(
    layers: nn.ModuleList,
    index: int,
    hidden_size: int,
    router_entries: Sequence[str],
    expert_entries: Sequence[str],
    kind: str,
    num_experts: int = 0,
    router_rows: int = 0,
    ranks: Mapping[str, list[int | None]] | None = None,
    merged: bool = False,
    **widths: Any,
) -> None:
    """Give a decoder layer of the uncompressed model the shape that `export.layer_shapes` describes, without weights.

    Args:
        router_entries, expert_entries: as of `compressed_classes`.
    """
    layer: Any = layers[index]
    if kind == "skipped":
        layers[index] = SkippedLayer()
        return
    block = layer.mlp
    pair = returns_pair(block)
    if kind == "zeros":
        layer.mlp = Zeros(pair)
        return
    experts, name = block.experts, router_name(block)
    router, before, bias = getattr(block, name), experts.num_experts, has_bias(experts)
    if kind == "condensed":
        layer.mlp = CondensedMoE(hidden_size, glu=glu_of(experts), scaled=False, bias=bias, pair=pair, **widths)
        return
    if router_rows != before:
        router = select_experts(router, range(router_rows), before, router_entries)
    if ranks is not None:
        experts = _KeptExperts(hidden_size, expert_width(experts), ranks, glu_of(experts), bias)
    elif num_experts != before:
        experts = select_experts(experts, range(num_experts), before, expert_entries)
    setattr(block, name, RemappedRouter(router, torch.zeros(router_rows, dtype=torch.int64)) if merged else router)
    block.experts = experts


def router_name(block: nn.Module) -> str:
    """The attribute of a sparse block that is its router."""
    return "gate" if hasattr(block, "gate") else "router"


def returns_pair(block: nn.Module) -> bool:
    """Whether a block returns its router's scores besides its output, as that of gpt_oss does."""
    return hasattr(block, "router") or bool(getattr(block, "pair", False))


def glu_of(experts: Any) -> Glu:
    """The gated activation of fused experts."""
    return ClampedGLU(experts.alpha, experts.limit) if hasattr(experts, "alpha") else GLU(experts.act_fn)


def has_bias(experts: nn.Module) -> bool:
    """Whether the projections of fused experts have biases."""
    return hasattr(experts, "gate_up_proj_bias")


def expert_width(experts: Any) -> int:
    """F of fused experts; down_proj is (E, D, F), or (E, F, D) if it is stored transposed."""
    return int(experts.down_proj.shape[1 if getattr(experts, "is_transposed", False) else 2])
