"""Losses of training besides the divergence from the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from recondense.data.labels import MASKED


def cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean next-token negative log-likelihood, nats per predicted token, in fp32.

    Args:
        labels_BS: ids to predict, those of the input; MASKED ones are not predicted and do not count.
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
        mask_BS: positions that count (bool); None: all.

    Returns:
        A scalar, nats per token (times τ²).
    """
    if mask_BS is not None:
        student_BSV, teacher_BSV = student_BSV[mask_BS], teacher_BSV[mask_BS]
    student = F.log_softmax(student_BSV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_BSV.float() / temperature, dim=-1)
    kl_sum = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return kl_sum * temperature**2 / student[..., 0].numel()


def load_balancing(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Mean over layers of E·Σ_e f_e·P_e: share of the top-k choices times mean probability; 1 when balanced.

    Args:
        router_logits: (T, E) of each sparse layer. Each layer is balanced on its own.

    Reference: Switch Transformers, arXiv 2101.03961, section 2.2, for top-k routing.
    """
    losses = []
    for logits_TE in router_logits:
        p_TE = torch.softmax(logits_TE.float(), dim=-1)
        num_experts = p_TE.shape[-1]
        chosen = torch.topk(p_TE.detach(), top_k, dim=-1).indices.flatten()
        share_E = torch.bincount(chosen, minlength=num_experts) / chosen.numel()
        losses.append(num_experts * (share_E * p_TE.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def feature_matching(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask_BS: Tensor | None = None,
    mean: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda values: values,
) -> Tensor:
    """Mean over layers of ‖h_student - h_teacher‖² / ‖h_teacher‖², for hidden states (B, S, D).

    Args:
        mask_BS: positions that count (bool); None: all. The states may have the rows of the batch in one.
        mean: over processes that share a batch; the mean of what they get is that of the whole batch.
    """
    if mask_BS is not None:
        student, teacher = ([h.flatten(0, 1)[mask_BS.flatten()] for h in states] for states in (student, teacher))
    errors = [F.mse_loss(m.float(), t.float(), reduction="sum") for m, t in zip(student, teacher, strict=True)]
    norms = torch.stack([theirs.float().square().sum() for theirs in teacher])
    least = 1e-12 * max(1, teacher[0].numel())
    return (torch.stack(errors) / mean({"norms": norms})["norms"].clamp_min(least)).mean()
