"""Labels: the tokens that the model should predict.

Legend: B batch, S sequence.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MASKED = -100  # the label of a token that is not a target


def target_mask(labels_BS: Tensor) -> Tensor:
    """Return a mask (B, S), bool: True at positions whose next label is not MASKED."""
    return F.pad(labels_BS[:, 1:] != MASKED, (0, 1))


def next_labels(labels_BS: Tensor) -> Tensor:
    """Return for each position the label that it predicts, the next one (B, S); MASKED for the last position."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=MASKED)
