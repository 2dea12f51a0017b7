"""Losses on full logits by their definitions, for comparison."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from recondense.data.labels import MASKED


def cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean next-token negative log-likelihood, nats per predicted token, in fp32.

    Args:
        labels_BS: the ids to predict, which are those of the input; positions with MASKED do not count.
    """
    logits = logits_BSV[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, labels_BS[:, 1:].flatten(), ignore_index=MASKED)


def forward_kl(
    student_BSV: Tensor, teacher_BSV: Tensor, temperature: float = 1.0, mask_BS: Tensor | None = None
) -> Tensor:
    """Forward KL from teacher to student over the vocabulary, τ²·KL(softmax(t/τ) ‖ softmax(s/τ)), mean over positions.

    The factor τ² keeps the size of the gradient (Hinton et al., arXiv 1503.02531, section 2.1).

    Args:
        student_BSV, teacher_BSV: logits; the last position counts too: it predicts, though no label follows it.
        temperature: τ > 0.
        mask_BS: the positions that count (bool); None counts all.

    Returns:
        A scalar, nats per token (times τ²).
    """
    if mask_BS is not None:
        student_BSV, teacher_BSV = student_BSV[mask_BS], teacher_BSV[mask_BS]
    student = F.log_softmax(student_BSV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_BSV.float() / temperature, dim=-1)
    kl_sum = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return kl_sum * temperature**2 / student[..., 0].numel()
