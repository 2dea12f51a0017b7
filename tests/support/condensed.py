"""The condensed layers of a model."""

from __future__ import annotations

from transformers import PreTrainedModel

from recondense.models import decoder, moe_blocks
from recondense.models.replacement_blocks import CondensedMoE


def condensed_layers(model: PreTrainedModel) -> dict[int, CondensedMoE]:
    """The condensed blocks, by the index of their decoder layer."""
    blocks = {layer: moe_blocks.get_block(model, layer) for layer in range(len(decoder.decoder_layers(model)))}
    return {layer: block for layer, block in blocks.items() if isinstance(block, CondensedMoE)}
