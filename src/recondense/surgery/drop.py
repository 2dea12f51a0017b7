"""Remove a feed-forward block or a whole decoder layer (arXiv 2406.02500, section 3: layer drop and block drop)."""

from __future__ import annotations

from torch import nn

from recondense.modules import SkippedLayer, Zeros
from recondense.plan import Drop


def restructure(operation: Drop) -> nn.Module:
    """What stands in for the removed part. The first decoder layer cannot go whole: the cache counts tokens by it.

    Raises:
        ValueError: the whole first decoder layer is to go.
    """
    if operation.part == "moe":
        return Zeros()
    if operation.layer == 0:
        raise ValueError("plan: drop layer 0: the first decoder layer cannot be removed whole; part=moe can")
    return SkippedLayer()
