"""Find out whether and how a family's config can express a compressed model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from recondense.config.schema import ExportConfig
from recondense.errors import UserError
from recondense.models import families, moe_blocks
from recondense.models.layer_shapes import Shapes
from recondense.models.parameters import count_parameters

NARROWEST = 16  # width of dense layers if all of them are zero: kernels need rows of a few bytes
# Features that no stock config can express, by their key in a layer's shape.
INEXPRESSIBLE = {
    "token_gate": "a gate per token",
    "constants": "constants in place of experts",
    "merged": "merged experts",
    "ranks": "low-rank experts",
}


class NotStock(UserError):
    """The family's class cannot express the model; the message says why."""


@dataclass(frozen=True)
class Stock:
    """How the family's class expresses a compressed model.

    Args:
        updates: changed values of the family's config.
        width: the width of every dense layer; narrower ones are padded with zeros. None without dense layers.
        padding: number of parameters that the padding adds.
    """

    updates: dict[str, Any] = field(default_factory=dict)
    width: int | None = None
    padding: int = 0


def choose_layout(model: PreTrainedModel, shapes: Shapes, settings: ExportConfig) -> Stock | None:
    """Return how the family's class expresses the model; None if the folder should be a bundle.

    A model that the class in transformers can express but the one in vLLM cannot becomes a bundle too, unless
    `settings.format` is "stock".

    Raises:
        NotStock: `settings.format` is "stock", and the class cannot express the model.
    """
    if settings.format == "bundled":
        return None
    try:
        stock = stock_layout(model, shapes, settings.max_padding)
    except NotStock as error:
        if settings.format == "stock":
            raise NotStock(f"export.format=stock: {error}; use export.format=auto or bundled") from None
        return None
    if settings.format == "stock" or not shapes or moe_blocks.sparse_blocks(model):
        return stock
    return None if families.family_of(model.config).needs_sparse else stock


def stock_layout(model: PreTrainedModel, shapes: Shapes, max_padding: float) -> Stock:
    """Return how the family's class expresses a model with these layers.

    Args:
        model: the compressed model.
        shapes: the changed layers, made by `layer_shapes`.
        max_padding: the most parameters that padding may add, as a fraction of the model's parameters.

    Raises:
        NotStock: the class cannot express the model, or only with more padding.
    """
    if not shapes:
        return Stock()
    name = families.family_name(model.config.model_type)
    for layer, shape in shapes.items():
        for key, what in INEXPRESSIBLE.items():
            if shape.get(key):
                raise NotStock(f"layer {layer} has {what}, which a config of {name} cannot express")
    sparse = {layer: shape["num_experts"] for layer, shape in shapes.items() if shape["kind"] == "sparse"}
    counts = {block.num_experts for block in moe_blocks.sparse_blocks(model).values()}
    expert_width = _expert_width(model, shapes)
    if len(counts) > 1:
        text = f"its layers have {min(counts)} to {max(counts)} experts, but a config of {name} has one number for all"
        raise NotStock(text)
    skipped = skipped_layers(shapes)
    new_widths = {layer: width for layer, shape in shapes.items() if (width := _dense_width(shape)) is not None}
    dense_widths = families.dense_widths(model.config)
    widths = [width for layer, width in dense_widths.items() if layer not in skipped]
    width = max(widths, default=None)
    if new_widths:
        widths += new_widths.values()
        width = max(widths) or NARROWEST
    updates = families.stock_updates(
        *(model.config, new_widths, skipped, counts.pop() if sparse else None),
        width=width if new_widths else None,
        expert_width=expert_width,
    )
    if updates is None:
        raise NotStock(f"its sparse and dense layers are mixed in a way that a config of {name} cannot express")
    if width is None or not new_widths:
        return Stock(updates, width)
    padding = sum(width - narrow for narrow in widths) * 3 * model.config.hidden_size
    total = count_parameters(model)
    if padding > max_padding * total:
        raise NotStock(
            f"its dense layers are {min(widths)} to {width} wide, but a config of {name} has one width for all: zeros "
            f"would add {padding / total:.1%} of the parameters (export.max_padding={max_padding:g})"
        )
    return Stock(updates, width, padding)


def _expert_width(model: PreTrainedModel, shapes: Shapes) -> int | None:
    """Return the new width of the routed experts of all sparse layers; None if no layer was narrowed.

    Raises:
        NotStock: the widths differ, or the family's config cannot have this width.
    """
    if not any("expert_width" in shape for shape in shapes.values()):
        return None
    name = families.family_name(model.config.model_type)
    widths = {width for block in moe_blocks.sparse_blocks(model).values() for width in block.widths}
    if len(widths) > 1:
        raise NotStock(
            f"its experts are {min(widths)} to {max(widths)} wide, but a config of {name} has one width for all"
        )
    [width] = widths
    if not families.keeps_shared_width(model.config, width):
        shared = families.original_facts(model.config).shared_width
        raise NotStock(
            f"its experts are {width} wide, and its shared experts {shared} together, but a config of {name} has "
            "shared experts that are each as wide as a routed one"
        )
    return width


def skipped_layers(shapes: Shapes) -> list[int]:
    """Return the decoder layers that were dropped entirely."""
    return [layer for layer, shape in shapes.items() if shape["kind"] == "skipped"]


def _dense_width(shape: Mapping[str, Any]) -> int | None:
    """Return the width of a layer that has become dense; None for any other layer."""
    if shape["kind"] == "zeros":
        return 0
    return shape["shared_width"] + shape["routed_width"] if shape["kind"] == "condensed" else None
