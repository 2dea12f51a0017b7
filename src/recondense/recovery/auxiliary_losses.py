"""Auxiliary losses of training; the losses of predictions are in losses.py.

Legend: B batch, S sequence, T tokens, D hidden size, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def load_balancing(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Compute the load-balancing loss, the mean over layers of E·Σ_e f_e·P_e.

    f_e is the fraction of the top-k choices that select expert e, and P_e its mean probability. The loss is 1 if the
    load is balanced.

    Args:
        router_logits: the logits (T, E) of each sparse layer. Each layer is balanced independently.
        top_k: number of experts that a token selects.

    Returns:
        The loss, a scalar.

    Reference: Switch Transformers, arXiv 2101.03961, section 2.2, for top-k routing.
    """
    losses = []
    for logits_TE in router_logits:
        p_TE = torch.softmax(logits_TE.float(), dim=-1)
        num_experts = p_TE.shape[-1]
        selected = torch.topk(p_TE.detach(), top_k, dim=-1).indices.flatten()
        share_E = torch.bincount(selected, minlength=num_experts) / selected.numel()
        losses.append(num_experts * (share_E * p_TE.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def feature_matching(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask_BS: Tensor | None = None,
    mean: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda values: values,
) -> Tensor:
    """Compute the mean over layers of ‖h_student - h_teacher‖² / ‖h_teacher‖².

    Args:
        student, teacher: hidden states (B, S, D) or (1, B·S, D) of each layer.
        mask_BS: the positions that count (bool); None for all.
        mean: averages values over the processes that share a batch, so that the mean of the processes' results is the
            loss of the entire batch.

    Returns:
        The loss, a scalar.
    """
    if mask_BS is not None:
        student, teacher = ([h.flatten(0, 1)[mask_BS.flatten()] for h in states] for states in (student, teacher))
    errors = [F.mse_loss(m.float(), t.float(), reduction="sum") for m, t in zip(student, teacher, strict=True)]
    norms = torch.stack([states.float().square().sum() for states in teacher])
    least = 1e-12 * max(1, teacher[0].numel())
    return (torch.stack(errors) / mean({"norms": norms})["norms"].clamp_min(least)).mean()
