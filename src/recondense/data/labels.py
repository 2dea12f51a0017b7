"""Which tokens are to be predicted.

Legend: B batch, S sequence.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def predicting(labels_BS: Tensor) -> Tensor:
    """The positions (B, S), bool, whose next token is to be predicted: those before a label that is not MASKED."""
    return F.pad(labels_BS[:, 1:] != MASKED, (0, 1))


def next_labels(labels_BS: Tensor) -> Tensor:
    """What each position is to predict, (B, S): the label after it, MASKED for the last."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=MASKED)


MASKED = -100  # the label of a token that is not to be predicted
