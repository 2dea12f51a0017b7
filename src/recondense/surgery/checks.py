"""What operations on experts check first."""

from __future__ import annotations

from collections.abc import Sequence

from recondense.errors import UserError
from recondense.models.views import SparseBlock


def check_experts(block: SparseBlock, kind: str, experts: Sequence[int]) -> None:
    """Refuse experts that the layer does not have.

    Raises:
        UserError: naming them.
    """
    missing = [expert for expert in experts if expert >= block.num_experts]
    if missing:
        raise UserError(
            f"plan: {kind} layer {block.layer}: it has {block.num_experts} routed experts; the plan retains {missing}"
        )
