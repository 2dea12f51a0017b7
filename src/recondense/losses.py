"""Divergences and losses as pure tensor functions.

Legend: C candidates, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-10  # what CD-MoE's code adds to both arguments of each KL
DIRECT_ABOVE = 8.0  # a row in which some logit moves further is scored by the definition, in fp64


def jensen_shannon(reference_TD: Tensor, difference_CTD: Tensor, apart: bool = False) -> Tensor:
    """Jensen-Shannon divergence between softmax(reference) and softmax(reference + difference), without cancellation.

    JS = ½ Σ_D [p' ln(p'/m) + q' ln(q'/m)],  p' = p + 1e-10, q' = q + 1e-10, m = (p' + q')/2

    With δ = (q' - p')/(q' + p') this is ½ Σ_D m·g(δ), g(δ) = δ·ln(q'/p') + ln(1 - δ²) ≥ 0: no term is the small
    difference of large ones, so fp32 keeps its digits however close p and q are. A softmax ignores a shift, so the
    difference is measured from its value at the reference's largest dimension: an outlier dimension adds no noise.

    Args:
        reference_TD: hidden states of the original model, taken as logits over the hidden dimension.
        difference_CTD: candidate minus original, better known directly than by subtraction. Overwritten.
        apart: a shorter computation for distributions known to lie apart (JS above some 1e-4 on the whole): the
            relative error of a row grows as they approach, 1e-5 at differences of 0.01.

    Returns:
        (C, T) in nats.

    Reference: Condense, Don't Just Prune, arXiv 2412.00069, section 3.2.
    """
    reference_TD = reference_TD.float()
    return js_from_difference(Reference.of(reference_TD), difference_CTD, apart)


class Reference(NamedTuple):
    """The original's side of a divergence, computed once for many candidates."""

    logits_TD: Tensor
    p_TD: Tensor
    largest_T1: Tensor

    @classmethod
    def of(cls, logits_TD: Tensor) -> Reference:
        return cls(logits_TD, torch.softmax(logits_TD, dim=-1), logits_TD.argmax(dim=-1, keepdim=True))


def js_from_difference(reference: Reference, difference_CTD: Tensor, apart: bool = False) -> Tensor:
    """`jensen_shannon` for a caller that keeps the reference's side."""
    return _js_apart(reference, difference_CTD.float()) if apart else _js_close(reference, difference_CTD.float())


def _js_close(reference: Reference, d_CTD: Tensor) -> Tensor:
    logits_TD, p_TD, largest_T1 = reference
    d_CTD.sub_(d_CTD.gather(-1, largest_T1.expand(d_CTD.shape[0], -1, -1)))
    far_CT = d_CTD.abs().amax(dim=-1) > DIRECT_ABOVE
    far = far_CT.nonzero(as_tuple=True)
    direct = _js_direct(logits_TD[far[1]], d_CTD[far]) if len(far[0]) else None
    if direct is not None:
        d_CTD.masked_fill_(far_CT.unsqueeze(-1), 0.0)
    # q/p - 1 = (e^d - Z)/Z with Z - 1 = Σ p (e^d - 1)
    d_CTD.expm1_()
    excess_CT1 = torch.einsum("ctd,td->ct", d_CTD, p_TD).unsqueeze(-1)
    ratio = d_CTD.sub_(excess_CT1).mul_(p_TD / (p_TD + EPSILON)).mul_(1 / (1 + excess_CT1))  # q'/p' - 1
    total = ratio + 2  # (p' + q')/p'
    terms = ratio.log1p()
    delta = ratio.div_(total)
    terms.mul_(delta).add_(delta.square_().neg_().log1p_()).mul_(total)
    js_CT = torch.einsum("ctd,td->ct", terms, p_TD + EPSILON) / 4
    if direct is not None:
        js_CT[far] = direct.to(js_CT.dtype)
    return js_CT


def _js_apart(reference: Reference, d_CTD: Tensor) -> Tensor:
    """½ Σ p' [(1 + r) ln(1 + r) - (2 + r) ln(1 + r/2)] with r = q'/p' - 1: the same sum with fewer operations."""
    logits_TD, p_TD, _ = reference
    weight_TD = p_TD + EPSILON
    ratio = torch.softmax(d_CTD.add_(logits_TD), dim=-1).sub_(p_TD).mul_(1 / weight_TD)
    ratio.clamp_(min=-1 + 2**-23)  # q' > 0, but its 1e-10 is lost beside a large p
    half = (ratio * 0.5).log1p_()
    terms = ratio.log1p().sub_(half)
    terms.addcmul_(terms, ratio).sub_(half)
    return torch.einsum("ctd,td->ct", terms, weight_TD) / 2


def _js_direct(reference_RD: Tensor, difference_RD: Tensor) -> Tensor:
    """The definition in fp64, for rows R whose distributions are far apart."""
    logits_RD = reference_RD.double()
    p_RD = torch.softmax(logits_RD, dim=-1) + EPSILON
    q_RD = torch.softmax(logits_RD + difference_RD.double(), dim=-1) + EPSILON
    m_RD = (p_RD + q_RD) / 2
    return ((p_RD * (p_RD / m_RD).log()) + (q_RD * (q_RD / m_RD).log())).sum(-1) / 2


def cross_entropy(logits_BSV: Tensor, input_ids_BS: Tensor) -> Tensor:
    """Mean next-token negative log-likelihood, nats per predicted token, in fp32."""
    logits = logits_BSV[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, input_ids_BS[:, 1:].flatten())


def forward_kl(student_BSV: Tensor, teacher_BSV: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward KL from teacher to student over the vocabulary, τ²·KL(softmax(t/τ) ‖ softmax(s/τ)), mean over positions.

    The factor τ² keeps the size of the gradient (Hinton et al., arXiv 1503.02531, section 2.1).

    Args:
        student_BSV, teacher_BSV: logits; the last position counts too: it predicts, though no label follows it.
        temperature: τ > 0.

    Returns:
        A scalar, nats per token (times τ²).
    """
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


def feature_matching(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over layers of ‖h_student - h_teacher‖² / ‖h_teacher‖², for hidden states (B, S, D)."""
    errors = [
        F.mse_loss(mine.float(), theirs.float()) / theirs.float().square().mean().clamp_min(1e-12)
        for mine, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()
