"""Which Hugging Face config can express a compressed model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from recondense.config.schema import ExportConfig
from recondense.errors import UserError
from recondense.models import decoder, families, views
from recondense.models.blocks import CondensedMoE, RemappedRouter, SkippedLayer, Zeros
from recondense.models.low_rank import LowRankExperts
from recondense.models.parameters import total_parameters

NARROWEST = 16  # of dense layers of zeros alone: kernels want rows of some bytes
Shapes = Mapping[int, Mapping[str, Any]]


class NotStock(UserError):
    """The family's own class cannot hold the model; the message says why."""


@dataclass(frozen=True)
class Stock:
    """How the family's own class holds a compressed model.

    Args:
        updates: of its config.
        width: of every dense layer; narrower ones are padded with zeros. None without dense layers.
        padding: parameters that padding adds.
    """

    updates: dict[str, Any] = field(default_factory=dict)
    width: int | None = None
    padding: int = 0


def layout(model: PreTrainedModel, shapes: Shapes, settings: ExportConfig) -> Stock | None:
    """How the family's own class would hold the model; None: the folder carries a modeling file.

    So does one that transformers' class could hold and vLLM's could not, where nobody asked for stock.

    Raises:
        NotStock: `settings.format` is stock, and it cannot.
    """
    if settings.format == "bundled":
        return None
    try:
        found = stock_layout(model, shapes, settings.max_padding)
        if settings.format == "stock" or not shapes or views.sparse_blocks(model):
            return found
        return None if families.family_of(model.config).needs_sparse else found
    except NotStock as error:
        if settings.format == "stock":
            raise NotStock(f"export.format=stock: {error}; use export.format=auto or bundled") from None
        return None


def stock_layout(model: PreTrainedModel, shapes: Shapes, max_padding: float) -> Stock:
    """How the family's own class holds a model with these layers.

    Args:
        max_padding: most that zeros may add, as a fraction of the model's parameters.

    Raises:
        NotStock: it cannot, or only with more padding.
    """
    if not shapes:
        return Stock()
    name = families.family_name(model.config.model_type)
    for layer, shape in shapes.items():
        odd = [word for word in ("token_gate", "merged", "ranks") if shape.get(word)]
        if odd:
            raise NotStock(f"layer {layer} has {ODD[odd[0]]}, which no config of {name} says")
    sparse = {layer: shape["num_experts"] for layer, shape in shapes.items() if shape["kind"] == "sparse"}
    counts = {block.num_experts for block in views.sparse_blocks(model).values()}
    if len(counts) > 1:
        raise NotStock(f"its layers have {min(counts)} to {max(counts)} experts; a config of {name} says one number")
    gone = rows_gone(shapes)
    widths = {layer: width for layer, shape in shapes.items() if (width := _width(shape)) is not None}
    own = {layer: width for layer, width in families.dense_widths(model.config).items() if layer not in gone}
    width = (max([*own.values(), *widths.values()]) or NARROWEST) if widths else None
    updates = families.stock_updates(model.config, widths, gone, counts.pop() if sparse else None, width)
    if updates is None:
        raise NotStock(f"its sparse and dense layers are mixed in a way that no config of {name} says")
    if width is None:
        return Stock(updates, max(own.values(), default=None))
    padding = sum(width - each for each in [*own.values(), *widths.values()]) * 3 * model.config.hidden_size
    total = total_parameters(model)
    if padding > max_padding * total:
        raise NotStock(
            f"its dense layers are {min([*own.values(), *widths.values()])} to {width} wide and a config of {name} "
            f"says one width: zeros would add {padding / total:.1%} (export.max_padding={max_padding:g})"
        )
    return Stock(updates, width, padding)


ODD = {"token_gate": "a gate per token", "merged": "merged experts", "ranks": "low-rank experts"}


def rows_gone(shapes: Shapes) -> list[int]:
    """Decoder layers that are no more."""
    return [layer for layer, shape in shapes.items() if shape["kind"] == "skipped"]


def _width(shape: Mapping[str, Any]) -> int | None:
    """Of a layer that is dense now; None of others."""
    if shape["kind"] == "zeros":
        return 0
    return shape["shared_width"] + shape["routed_width"] if shape["kind"] == "condensed" else None


def condensed_layers(model: PreTrainedModel) -> dict[int, CondensedMoE]:
    """The condensed layers of a model, by decoder-layer index."""
    blocks = {layer: views.get_block(model, layer) for layer in range(len(decoder.decoder_layers(model)))}
    return {layer: block for layer, block in blocks.items() if isinstance(block, CondensedMoE)}


def layer_shapes(model: PreTrainedModel, *, multiplied: bool = False) -> dict[int, dict[str, Any]]:
    """What became of each layer that is not as the family's config says: JSON values, arguments of `bundle.reshape`.

    Args:
        multiplied: low-rank experts count as whole ones.
    """
    found: dict[int, dict[str, Any]] = {}
    num_experts = families.original_facts(model.config).num_experts
    for layer in range(len(decoder.decoder_layers(model))):
        block = views.get_block(model, layer)
        if isinstance(block, SkippedLayer):
            found[layer] = {"kind": "skipped"}
        elif isinstance(block, Zeros):
            found[layer] = {"kind": "zeros"}
        elif isinstance(block, CondensedMoE):
            found[layer] = {
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
                found[layer] = shape
    return found


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
