"""Jensen-Shannon divergence between near-equal distributions, without cancellation.

Legend: C candidates, T tokens, D hidden size, R rows of (C, T).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-10  # CD-MoE's code adds this to both arguments of each KL
# The next two avoid denormal numbers, with which a CPU is ten times slower. They do not change results.
LOWEST = -70.0  # lower bound on a logit minus its row's largest: e^-70 is negligible beside EPSILON
NOTHING = 1e-15  # a smaller |q'/p' - 1| is set to 0: the divergence depends on its square
DIRECT_ABOVE = 8.0  # rows in which any logit changes by more than this are scored in fp64


class Reference(NamedTuple):
    """The original's part of a divergence, computed once for many candidates.

    Args:
        logits_TD: hidden states, fp32.
        shifted_TD: the logits minus the largest logit of their row.
        p_TD: the softmax of the logits.
        weight_TD: p' = p + 1e-10.
        inverse_TD: 1 / p'.
        largest_T1: the index of each row's largest logit.
    """

    logits_TD: Tensor
    shifted_TD: Tensor
    p_TD: Tensor
    weight_TD: Tensor
    inverse_TD: Tensor
    largest_T1: Tensor

    @classmethod
    def prepare(cls, logits_TD: Tensor) -> Reference:
        """Compute the reference from the logits (T, D)."""
        highest_T1, largest_T1 = logits_TD.max(dim=-1, keepdim=True)
        shifted_TD = logits_TD - highest_T1
        p_TD = torch.softmax(shifted_TD.clamp(min=LOWEST), dim=-1)
        weight_TD = p_TD + EPSILON
        return cls(logits_TD, shifted_TD, p_TD, weight_TD, 1 / weight_TD, largest_T1)


def jensen_shannon(reference: Reference, difference_CTD: Tensor, apart: bool = False) -> Tensor:
    """Compute the Jensen-Shannon divergence of softmax(reference + difference) from softmax(reference).

    JS = ½ Σ_D [p' ln(p'/m) + q' ln(q'/m)],  p' = p + 1e-10, q' = q + 1e-10, m = (p' + q')/2

    With δ = (q' - p')/(q' + p') this is ½ Σ_D m·g(δ), g(δ) = δ·ln(q'/p') + ln(1 - δ²) ≥ 0. No term is a small
    difference of large numbers, so fp32 keeps its precision no matter how close p and q are. A softmax does not change
    if all logits are shifted, so the difference is taken relative to its value at the reference's largest dimension;
    an outlier dimension then adds no noise.

    Args:
        reference: prepared from hidden states of the original model, used as logits over the hidden dimension.
        difference_CTD: candidate minus original, ideally computed directly and not by subtraction. Overwritten.
        apart: use a shorter computation for distributions that differ clearly (a mean JS above about 1e-4). The
            relative error of a row grows as they approach each other: it is 1e-5 at differences of 0.01.

    Returns:
        The divergence (C, T) in nats.

    Reference: Condense, Don't Just Prune, arXiv 2412.00069, section 3.2.
    """
    return _js_apart(reference, difference_CTD.float()) if apart else _js_close(reference, difference_CTD.float())


def _js_close(reference: Reference, d_CTD: Tensor) -> Tensor:
    _, shifted_TD, p_TD, weight_TD, inverse_TD, largest_T1 = reference
    d_CTD.sub_(d_CTD.gather(-1, largest_T1.expand(d_CTD.shape[0], -1, -1)))
    far_CT = d_CTD.abs().amax(dim=-1) > DIRECT_ABOVE
    far = far_CT.nonzero(as_tuple=True)
    direct = _js_direct(shifted_TD[far[1]], d_CTD[far]) if len(far[0]) else None
    if direct is not None:
        d_CTD.masked_fill_(far_CT.unsqueeze(-1), 0.0)
    # q/p - 1 = (e^d - Z)/Z with Z - 1 = Σ p (e^d - 1)
    d_CTD.expm1_()
    excess_CT1 = (d_CTD * p_TD).sum(dim=-1, keepdim=True)
    ratio = d_CTD.sub_(excess_CT1).mul_(p_TD * inverse_TD).mul_(1 / (1 + excess_CT1))  # q'/p' - 1
    js_CT = _from_ratio(F.hardshrink(ratio, NOTHING), weight_TD)
    if direct is not None:
        js_CT[far] = direct.to(js_CT.dtype)
    return js_CT


def _from_ratio(ratio: Tensor, weight_TD: Tensor) -> Tensor:
    """Compute ¼ Σ p' (2 + r) g(r/(2 + r)) with r = q'/p' - 1; r is overwritten."""
    total = ratio + 2  # (p' + q')/p'
    terms = ratio.log1p()
    delta = ratio.div_(total)
    terms.mul_(delta).add_(delta.square_().neg_().log1p_())
    return terms.mul_(total).mul_(weight_TD).sum(dim=-1) / 4


def _js_apart(reference: Reference, d_CTD: Tensor) -> Tensor:
    """Compute ½ Σ p' [u ln u - (1 + u) ln((1 + u)/2)] with u = q'/p': the same sum with fewer operations."""
    logits_CTD = d_CTD.add_(reference.shifted_TD)
    # Another dimension than the reference's may be the largest.
    logits_CTD = logits_CTD.sub_(logits_CTD.amax(dim=-1, keepdim=True)).clamp_(min=LOWEST)
    u_CTD = torch.softmax(logits_CTD, dim=-1).add_(EPSILON).mul_(reference.inverse_TD)
    half_CTD = torch.add(u_CTD.new_tensor(-0.5), u_CTD, alpha=0.5).log1p_()  # ln((1 + u)/2), exact for u near 1
    terms_CTD = u_CTD.log().sub_(half_CTD).mul_(u_CTD).sub_(half_CTD)
    return terms_CTD.mul_(reference.weight_TD).sum(dim=-1) / 2


def _js_direct(logits_RD: Tensor, difference_RD: Tensor) -> Tensor:
    """Compute the same sum in fp64 from both softmaxes, for rows in which e^d may overflow."""
    logits_RD = logits_RD.double()
    p_RD = torch.softmax(logits_RD, dim=-1)
    q_RD = torch.softmax(logits_RD + difference_RD.double(), dim=-1)
    return _from_ratio((q_RD - p_RD) / (p_RD + EPSILON), p_RD + EPSILON)
