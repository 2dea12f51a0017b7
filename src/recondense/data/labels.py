"""Labels: the tokens that are to be predicted.

Legend: B batch, S sequence.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MASKED = -100  # the label of a token that is not to be predicted


def target_mask(labels_BS: Tensor) -> Tensor:
    """The positions that predict: True if the label after a position is not MASKED, (B, S) bool."""
    return F.pad(labels_BS[:, 1:] != MASKED, (0, 1))


def next_labels(labels_BS: Tensor) -> Tensor:
    """The label that each position predicts, the one after it, (B, S); MASKED for the last position."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=MASKED)
