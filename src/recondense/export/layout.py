"""Whether a family's config can express a compressed model, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from recondense.config.schema import ExportConfig
from recondense.errors import UserError
from recondense.models import decoder, families, views
from recondense.models.low_rank import LowRankExperts
from recondense.models.parameters import count_parameters
from recondense.models.replacement_blocks import CondensedMoE, RemappedRouter, SkippedLayer, Zeros

NARROWEST = 16  # width of dense layers if all of them are zeros: kernels want rows of some bytes
# What no stock config says, by its key in a layer's shape.
INEXPRESSIBLE = {"token_gate": "a gate per token", "merged": "merged experts", "ranks": "low-rank experts"}
Shapes = Mapping[int, Mapping[str, Any]]  # by `layer_shapes`


class NotStock(UserError):
    """The family's class cannot hold the model; the message says why."""


@dataclass(frozen=True)
class Stock:
    """How the family's class holds a compressed model.

    Args:
        updates: of its config.
        width: of every dense layer; narrower ones are padded with zeros. None without dense layers.
        padding: number of parameters that padding adds.
    """

    updates: dict[str, Any] = field(default_factory=dict)
    width: int | None = None
    padding: int = 0


def choose_layout(model: PreTrainedModel, shapes: Shapes, settings: ExportConfig) -> Stock | None:
    """How the family's class holds the model; None if the folder is to be a bundle.

    A model that transformers' class can hold and vLLM's cannot becomes a bundle too, unless stock is asked for.

    Raises:
        NotStock: `settings.format` is stock, and the class cannot hold the model.
    """
    if settings.format == "bundled":
        return None
    try:
        stock = stock_layout(model, shapes, settings.max_padding)
    except NotStock as error:
        if settings.format == "stock":
            raise NotStock(f"export.format=stock: {error}; use export.format=auto or bundled") from None
        return None
    if settings.format == "stock" or not shapes or views.sparse_blocks(model):
        return stock
    return None if families.family_of(model.config).needs_sparse else stock


def stock_layout(model: PreTrainedModel, shapes: Shapes, max_padding: float) -> Stock:
    """How the family's class holds a model with these layers.

    Args:
        max_padding: how much zeros may add, as a fraction of the model's parameters.

    Raises:
        NotStock: it cannot, or only with more padding.
    """
    if not shapes:
        return Stock()
    name = families.family_name(model.config.model_type)
    for layer, shape in shapes.items():
        for key, what in INEXPRESSIBLE.items():
            if shape.get(key):
                raise NotStock(f"layer {layer} has {what}, which no config of {name} says")
    sparse = {layer: shape["num_experts"] for layer, shape in shapes.items() if shape["kind"] == "sparse"}
    counts = {block.num_experts for block in views.sparse_blocks(model).values()}
    if len(counts) > 1:
        raise NotStock(f"its layers have {min(counts)} to {max(counts)} experts; a config of {name} says one number")
    skipped = skipped_layers(shapes)
    new_widths = {layer: width for layer, shape in shapes.items() if (width := _dense_width(shape)) is not None}
    dense_widths = families.dense_widths(model.config)
    widths = [width for layer, width in dense_widths.items() if layer not in skipped]
    width = max(widths, default=None)
    if new_widths:
        widths += new_widths.values()
        width = max(widths) or NARROWEST
    updates = families.stock_updates(
        model.config, new_widths, skipped, counts.pop() if sparse else None, width if new_widths else None
    )
    if updates is None:
        raise NotStock(f"its sparse and dense layers are mixed in a way that no config of {name} says")
    if width is None or not new_widths:
        return Stock(updates, width)
    padding = sum(width - narrow for narrow in widths) * 3 * model.config.hidden_size
    total = count_parameters(model)
    if padding > max_padding * total:
        raise NotStock(
            f"its dense layers are {min(widths)} to {width} wide and a config of {name} says one width: zeros would "
            f"add {padding / total:.1%} (export.max_padding={max_padding:g})"
        )
    return Stock(updates, width, padding)


def skipped_layers(shapes: Shapes) -> list[int]:
    """The decoder layers that were dropped as a whole."""
    return [layer for layer, shape in shapes.items() if shape["kind"] == "skipped"]


def _dense_width(shape: Mapping[str, Any]) -> int | None:
    """The width of a layer that has become dense; None for any other layer."""
    if shape["kind"] == "zeros":
        return 0
    return shape["shared_width"] + shape["routed_width"] if shape["kind"] == "condensed" else None


def layer_shapes(model: PreTrainedModel, *, multiplied: bool = False) -> dict[int, dict[str, Any]]:
    """The shape of each layer that is not as the family's config says: JSON values, arguments of `compressed.reshape`.

    Args:
        multiplied: describe low-rank experts as they are when they are multiplied out.
    """
    shapes: dict[int, dict[str, Any]] = {}
    num_experts = families.original_facts(model.config).num_experts
    for layer in range(len(decoder.decoder_layers(model))):
        block = views.get_block(model, layer)
        if isinstance(block, SkippedLayer):
            shapes[layer] = {"kind": "skipped"}
        elif isinstance(block, Zeros):
            shapes[layer] = {"kind": "zeros"}
        elif isinstance(block, CondensedMoE):
            shapes[layer] = {
                "kind": "condensed",
                "shared_width": block.shared_width,
                "routed_width": block.routed_width,
                "token_gate": block.shared_expert_gate is not None,
            }
        elif views.is_sparse(block):
            shape = _sparse_shape(views.sparse_view(model, layer, block))
            if multiplied:
                shape.pop("ranks", None)
            if shape != {"kind": "sparse", "num_experts": num_experts, "router_rows": num_experts}:
                shapes[layer] = shape
    return shapes


def _sparse_shape(block: views.SparseBlock) -> dict[str, Any]:
    router = block.router
    shape: dict[str, Any] = {
        "kind": "sparse",
        "num_experts": block.num_experts,
        "router_rows": len(router.table) if isinstance(router, RemappedRouter) else block.num_experts,
    }
    if isinstance(router, RemappedRouter):
        shape["merged"] = True
    if isinstance(block.experts, LowRankExperts):
        shape["ranks"] = {name: list(ranks) for name, ranks in block.experts.ranks.items()}
    return shape
