"""Divergences and losses as pure tensor functions.

Legend: C candidates, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-10  # what CD-MoE's code adds to both arguments of each KL
DIRECT_ABOVE = 8.0  # a row in which some logit moves further is scored by the definition, in fp64


def jensen_shannon(reference_TD: Tensor, difference_CTD: Tensor) -> Tensor:
    """Jensen-Shannon divergence between softmax(reference) and softmax(reference + difference), without cancellation.

    JS = ½ Σ_D [p' ln(p'/m) + q' ln(q'/m)],  p' = p + 1e-10, q' = q + 1e-10, m = (p' + q')/2

    With δ = (q' - p')/(q' + p') this is ½ Σ_D m·g(δ), g(δ) = δ·ln(q'/p') + ln(1 - δ²) ≥ 0: no term is the small
    difference of large ones, so fp32 keeps its digits however close p and q are. A softmax ignores a shift, so the
    difference is measured from its value at the reference's largest dimension: an outlier dimension adds no noise.

    Args:
        reference_TD: hidden states of the original model, taken as logits over the hidden dimension.
        difference_CTD: candidate minus original, better known directly than by subtraction. Overwritten.

    Returns:
        (C, T) in nats.

    Reference: Condense, Don't Just Prune, arXiv 2412.00069, section 3.2.
    """
    reference_TD = reference_TD.float()
    p_TD = torch.softmax(reference_TD, dim=-1)
    return js_from_difference(reference_TD, p_TD, reference_TD.argmax(dim=-1, keepdim=True), difference_CTD)


def js_from_difference(reference_TD: Tensor, p_TD: Tensor, largest_T1: Tensor, difference_CTD: Tensor) -> Tensor:
    """`jensen_shannon` for a caller that keeps softmax(reference) and its argmax across candidates."""
    d_CTD = difference_CTD.float()
    index = largest_T1.expand(d_CTD.shape[0], -1, -1)
    d_CTD.sub_(d_CTD.gather(-1, index))
    far_CT = d_CTD.abs().amax(dim=-1) > DIRECT_ABOVE
    far = far_CT.nonzero(as_tuple=True)
    direct = _js_direct(reference_TD[far[1]], d_CTD[far]) if len(far[0]) else None
    if direct is not None:
        d_CTD.masked_fill_(far_CT.unsqueeze(-1), 0.0)
    # q/p - 1 = (e^d - Z)/Z with Z - 1 = Σ p (e^d - 1)
    d_CTD.expm1_()
    excess_CT1 = torch.einsum("ctd,td->ct", d_CTD, p_TD).unsqueeze(-1)
    change = d_CTD.sub_(excess_CT1).mul_(p_TD).div_(1 + excess_CT1)  # q - p
    sum_CTD = change + (2 * p_TD + 2 * EPSILON)  # p' + q'
    log_ratio = (change / (p_TD + EPSILON)).log1p_()  # ln(q'/p')
    delta = change.div_(sum_CTD)
    terms = log_ratio.mul_(delta).add_(delta.square_().neg_().log1p_())
    js_CT = torch.einsum("ctd,ctd->ct", terms, sum_CTD) / 4
    if direct is not None:
        js_CT[far] = direct.to(js_CT.dtype)
    return js_CT


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


def feature_matching(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over layers of ‖h_student - h_teacher‖² / ‖h_teacher‖², for hidden states (B, S, D)."""
    errors = [
        F.mse_loss(mine.float(), theirs.float()) / theirs.float().square().mean().clamp_min(1e-12)
        for mine, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()
