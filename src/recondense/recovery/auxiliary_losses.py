"""Losses of training other than those of predictions, which are in chunked_losses.py.

Legend: B batch, S sequence, T tokens, D hidden size, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def load_balancing(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Mean over layers of E·Σ_e f_e·P_e: share of the top-k choices times mean probability; 1 when balanced.

    Args:
        router_logits: (T, E) of each sparse layer. Each layer is balanced on its own.
        top_k: experts that a token selects.

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
    """Mean over layers of ‖h_student - h_teacher‖² / ‖h_teacher‖².

    Args:
        student, teacher: hidden states (B, S, D) of each layer.
        mask_BS: positions that count (bool); None: all. The states may have all rows of the batch in one.
        mean: the mean over the processes that share a batch; the mean of their results is that of the whole batch.
    """
    if mask_BS is not None:
        student, teacher = ([h.flatten(0, 1)[mask_BS.flatten()] for h in states] for states in (student, teacher))
    errors = [F.mse_loss(m.float(), t.float(), reduction="sum") for m, t in zip(student, teacher, strict=True)]
    norms = torch.stack([theirs.float().square().sum() for theirs in teacher])
    least = 1e-12 * max(1, teacher[0].numel())
    return (torch.stack(errors) / mean({"norms": norms})["norms"].clamp_min(least)).mean()
