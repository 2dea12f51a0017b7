"""Remove a MoE block or an entire decoder layer (arXiv 2406.02500, section 3: layer drop and block drop)."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from recondense.errors import UserError
from recondense.models import compressed_classes, decoder, moe_blocks
from recondense.models.removed_blocks import SkippedLayer, Zeros
from recondense.operations import Drop


def restructure(model: PreTrainedModel, operation: Drop) -> nn.Module:
    """Return the module that replaces the removed part.

    Raises:
        UserError: the operation removes a decoder layer that must stay, see `decoder.cache_layers`.
    """
    if operation.part == "moe":
        return Zeros(pair=compressed_classes.returns_pair(moe_blocks.get_block(model, operation.layer)))
    if operation.layer in decoder.cache_layers(model.config):
        raise UserError(
            f"plan: drop, layer {operation.layer}: the key-value cache counts tokens with this decoder layer, so only "
            "its MoE block can be removed (part=moe)"
        )
    return SkippedLayer.instead_of(decoder.decoder_layers(model)[operation.layer])
