"""Remove a feed-forward block or a whole decoder layer (arXiv 2406.02500, section 3: layer drop and block drop)."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from recondense import families
from recondense.errors import UserError
from recondense.modules import SkippedLayer, Zeros
from recondense.plan import Drop


def restructure(model: PreTrainedModel, operation: Drop) -> nn.Module:
    """What stands in for the removed part.

    Raises:
        UserError: a whole layer that must stay, see `families.cache_layers`.
    """
    if operation.part == "moe":
        return Zeros(pair=families.gives_pair(families.get_block(model, operation.layer)))
    if operation.layer in families.cache_layers(model.config):
        raise UserError(
            f"plan: drop layer {operation.layer}: the key-value cache counts tokens by this decoder layer, so it "
            "cannot be removed whole; part=moe can"
        )
    return SkippedLayer()
