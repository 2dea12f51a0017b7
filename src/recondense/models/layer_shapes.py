"""The shapes of a compressed model's layers: for the config of its export, and to tell whether it was compressed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from recondense.errors import UserError
from recondense.models import decoder, families, moe_blocks
from recondense.models.compressed_classes import PREFIX
from recondense.models.constant_experts import ConstantExperts
from recondense.models.low_rank import LowRankExperts
from recondense.models.removed_blocks import SkippedLayer, Zeros
from recondense.models.replacement_blocks import (
    CondensedMoE,
    RemappedRouter,
)

Shapes = Mapping[int, Mapping[str, Any]]  # by decoder-layer index


def layer_shapes(model: PreTrainedModel, *, multiplied: bool = False) -> dict[int, dict[str, Any]]:
    """Return the shape of each layer that differs from the family's uncompressed model, as arguments of `reshape`.

    See `compressed_classes.reshape`. The shapes are JSON values.

    Args:
        model: the compressed model.
        multiplied: describe low-rank experts as if they were multiplied out.
    """
    shapes: dict[int, dict[str, Any]] = {}
    original = families.original_facts(model.config)
    num_experts = original.num_experts
    for layer in range(len(decoder.decoder_layers(model))):
        block = moe_blocks.get_block(model, layer)
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
        elif moe_blocks.is_sparse(block):
            shape = _sparse_shape(moe_blocks.sparse_view(model, layer, block), original.expert_width)
            if multiplied:
                shape.pop("ranks", None)
            if shape != {"kind": "sparse", "num_experts": num_experts, "router_rows": num_experts}:
                shapes[layer] = shape
    return shapes


def differs_from_config(model: PreTrainedModel) -> bool:
    """Return whether layers of a model have other shapes than its config says: it was compressed after its loading."""
    return layer_shapes(model) != families.compressed_layers(model.config)


def refuse_bundled_classes(model: PreTrainedModel) -> None:
    """Refuse a model whose classes come from the modeling file of a bundled export: their blocks are not ours.

    Raises:
        UserError: it has such classes.
    """
    is_remote = type(model).__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")
    if is_remote and model.config.model_type.startswith(PREFIX):
        raise UserError(
            f"{model.config.name_or_path}: the model was loaded with the modeling file of its folder. Load it with "
            "recondense.load to compress it further"
        )


def _sparse_shape(block: moe_blocks.SparseBlock, original_width: int) -> dict[str, Any]:
    router = block.router
    shape: dict[str, Any] = {
        "kind": "sparse",
        "num_experts": block.num_experts,
        "router_rows": len(router.table) if isinstance(router, RemappedRouter) else block.num_experts,
    }
    if isinstance(router, RemappedRouter):
        shape["merged"] = True
    if isinstance(block.experts, ConstantExperts):
        shape["constants"] = len(block.experts.constants)
    widths = set(block.widths)
    if widths != {original_width}:
        shape["expert_width"] = widths.pop() if len(widths) == 1 else list(block.widths)
    if isinstance(block.experts, LowRankExperts) and block.experts.factorized:
        shape["ranks"] = {name: list(ranks) for name, ranks in block.experts.ranks.items()}
    return shape
