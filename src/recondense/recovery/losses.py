"""Losses over a large vocabulary, computed from hidden states in chunks of tokens: no (T, V) tensor ever exists.

The gradient of every loss with respect to the logits has a closed form. The loss and its gradient are computed together
from a chunk's logits, which are then freed. The backward pass only scales the gradient of the hidden states (T, D).

Legend: T tokens, C tokens of a chunk, V vocabulary, D hidden size, K kept predictions of a teacher.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recondense.config.schema import Divergence
from recondense.data import labels
from recondense.data.labels import MASKED
from recondense.models.decoder import Head

LN2 = 0.6931471805599453
# Bytes of a chunk's logits in fp32; a few tensors of this size exist at a time. On a CPU, small chunks fit the caches.
# On a GPU, reading the head's weights once per chunk must not take longer than the products.
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}
LEAST_ROWS = 32  # minimum number of tokens in a chunk; with fewer, the products are slow


class TopK(NamedTuple):
    """A teacher's K most likely tokens, and the total probability of all others.

    Args:
        ids_TK: the ids of the tokens.
        logits_TK: their logits, at temperature 1.
        rest_T: logsumexp of all other logits, at the temperature of the distillation.
    """

    ids_TK: Tensor
    logits_TK: Tensor
    rest_T: Tensor


class Hidden(NamedTuple):
    """A teacher's final hidden states and its head, from which logits are computed one chunk at a time."""

    hidden_TD: Tensor
    head: Head


class Term(Protocol):
    """A loss as a function of logits."""

    def __call__(self, logits_CV: Tensor, rows: slice, grad: bool) -> tuple[Tensor, Tensor | None]:
        """Compute the loss of each row (C,), and its gradient with respect to the logits (C, V).

        Args:
            logits_CV: logits in fp32; they are not overwritten.
            rows: the positions of the rows among the T tokens.
            grad: whether to return the gradient, as a new tensor.
        """


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-likelihood of labels; the loss is 0 for rows whose label is MASKED."""

    labels_T: Tensor

    def __call__(self, logits_CV: Tensor, rows: slice, grad: bool) -> tuple[Tensor, Tensor | None]:
        labels_C1 = self.labels_T[rows].unsqueeze(-1)
        counted_C1 = labels_C1 != labels.MASKED
        labels_C1 = labels_C1.clamp_min(0)
        log_q_CV = logits_CV.log_softmax(-1)
        loss_C = -(log_q_CV.gather(-1, labels_C1) * counted_C1).squeeze(-1)
        if not grad:
            return loss_C, None
        q_CV = log_q_CV.exp_()
        q_CV.scatter_add_(-1, labels_C1, q_CV.new_full(labels_C1.shape, -1.0))
        return loss_C, q_CV if bool(counted_C1.all()) else q_CV.mul_(counted_C1)


@dataclass(frozen=True)
class TeacherDivergence:
    """τ²·D(teacher, student) over the vocabulary at temperature τ, with D = KL(t‖s), KL(s‖t) or Jensen-Shannon.

    If only the teacher's top K predictions are known, D is computed over K + 1 outcomes: the known tokens, and any
    other token. That is a lower bound of the full D (data-processing inequality). For the forward KL the difference is
    r·KL(teacher's rest ‖ student's rest), where r is the teacher's probability of all other tokens, and both rests are
    normalized.

    Args:
        kind: the divergence.
        teacher: hidden states and a head, or the top K predictions.
        temperature: τ > 0. The factor τ² keeps the size of the gradient (Hinton et al., arXiv 1503.02531, section 2.1).
    """

    kind: Divergence
    teacher: Hidden | TopK
    temperature: float = 1.0

    def __call__(self, logits_CV: Tensor, rows: slice, grad: bool) -> tuple[Tensor, Tensor | None]:
        t = self.temperature
        log_q_CV = (logits_CV if t == 1 else logits_CV / t).log_softmax(-1)
        if isinstance(self.teacher, TopK):
            loss_C, grad_CV = self._diverge_top_k(self.teacher, log_q_CV, rows, grad)
        else:
            teacher_CV = self.teacher.head.logits(self.teacher.hidden_TD[rows]).float()
            teacher_CV = teacher_CV if t == 1 else teacher_CV.div_(t)
            loss_C, grad_CV = diverge_(self.kind, log_q_CV, teacher_CV.log_softmax(-1), grad)
        if t == 1:
            return loss_C, grad_CV
        return loss_C * t**2, None if grad_CV is None else grad_CV.mul_(t)

    def _diverge_top_k(self, top: TopK, log_q_CV: Tensor, rows: slice, grad: bool) -> tuple[Tensor, Tensor | None]:
        ids_CK = top.ids_TK[rows].to(log_q_CV.device, torch.int64)
        teacher_CK = top.logits_TK[rows].to(log_q_CV.device).float() / self.temperature
        rest_C1 = top.rest_T[rows].to(log_q_CV.device).unsqueeze(-1)
        log_p_CK = torch.cat([teacher_CK, rest_C1], -1).log_softmax(-1)
        student_CK = log_q_CV.gather(-1, ids_CK)
        others_CV = log_q_CV.exp_().scatter_(-1, ids_CK, 0.0)  # the student's rest
        rest_C1 = others_CV.sum(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        loss_C, grad_CK = diverge_(self.kind, torch.cat([student_CK, rest_C1.log()], -1), log_p_CK, grad)
        if grad_CK is None:
            return loss_C, None
        grad_CV = others_CV.mul_(grad_CK[:, -1:] / rest_C1)  # the rest's logit is the logsumexp of its tokens' logits
        return loss_C, grad_CV.scatter_(-1, ids_CK, grad_CK[:, :-1])


def diverge_(kind: Divergence, log_q: Tensor, log_p: Tensor, grad: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the divergence of each row, and its gradient with respect to the logits of q.

    The gradients are q - p for KL(p‖q), q·(ln q/p - KL) for KL(q‖p), and ½q·(ln q/m - KL(q‖m)) for
    JS = ½KL(p‖m) + ½KL(q‖m), m = (p + q)/2.

    Args:
        kind: the divergence.
        log_q, log_p: log-probabilities (C, V) of the student and the teacher. Both are overwritten.
        grad: whether to return the gradient.

    Returns:
        The divergences (C,), and the gradient (C, V) or None.
    """
    if kind == "forward_kl":
        p = log_p.exp()
        loss = log_p.sub_(log_q).mul_(p).sum(-1)
        return loss, log_q.exp_().sub_(p) if grad else None
    q = log_q.exp()
    if kind == "reverse_kl":
        ratio = log_q.sub_(log_p)
        loss = (q * ratio).sum(-1, keepdim=True)
        return loss.squeeze(-1), ratio.sub_(loss).mul_(q) if grad else None
    assert kind == "js", kind
    log_m = torch.logaddexp(log_q, log_p).sub_(LN2)
    p = log_p.exp()
    kl_p = log_p.sub_(log_m).mul_(p).sum(-1)
    ratio = log_q.sub_(log_m)
    kl_q = (q * ratio).sum(-1, keepdim=True)
    loss = (kl_p + kl_q.squeeze(-1)) / 2
    return loss, ratio.sub_(kl_q).mul_(q).mul_(0.5) if grad else None


def sum_in_chunks(
    terms: Sequence[tuple[float, Term]], hidden_TD: Tensor, head: Head, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute Σ_i weight_i · Σ_t term_i(head(hidden_t)) with the logits of only one chunk of tokens in memory.

    Args:
        terms: pairs of a weight and a loss.
        hidden_TD: final hidden states.
        head: the LM head; it gets gradients if its weights require them.
        rows: tokens per chunk; None uses `chunk_rows`.

    Returns:
        The weighted sum, a scalar in fp32, and the unweighted sum of each term (fp32, without gradient).
    """
    (first, term), *others = terms
    parts = [hidden_TD, *(part for part in head if part is not None)]
    grad = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    if grad and not others and isinstance(term, CrossEntropy) and can_use_liger(hidden_TD):
        loss = liger_cross_entropy(hidden_TD, head.weight_VD, head.bias_V, term.labels_T)
        return first * loss, loss.detach().float().reshape(1)
    rows = rows or chunk_rows(head.weight_VD)
    total, sums = _Chunked.apply(hidden_TD, head.weight_VD, head.bias_V, terms, rows, grad)  # type: ignore[no-untyped-call]
    return total, sums


def chunk_rows(weight_VD: Tensor) -> int:
    """Return the number of tokens per chunk that suits the device, for logits in fp32."""
    chunk_bytes = CHUNK_BYTES.get(weight_VD.device.type, CHUNK_BYTES["cpu"])
    return max(LEAST_ROWS, chunk_bytes // (4 * weight_VD.shape[0]))


def chunks(num_tokens: int, rows: int) -> Iterator[slice]:
    """Yield slices of at most `rows` tokens, in order."""
    for start in range(0, num_tokens, rows):
        yield slice(start, min(start + rows, num_tokens))


class _Chunked(torch.autograd.Function):
    """Computes the gradient in the forward pass, from the chunk's logits; the backward pass scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        terms: Sequence[tuple[float, Term]],
        rows: int,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        head = Head(weight_VD, bias_V)
        needs = [grad and needs_grad for needs_grad in ctx.needs_input_grad[:3]]
        sums = torch.zeros(len(terms), dtype=torch.float64, device=hidden_TD.device)
        d_hidden = torch.empty_like(hidden_TD) if needs[0] else None
        # Summed over many chunks, so in fp32 regardless of the weights' dtype.
        d_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs[1] else None
        d_bias = torch.zeros_like(bias_V, dtype=torch.float32) if needs[2] and bias_V is not None else None
        for part in chunks(len(hidden_TD), rows):
            logits_CV = head.logits(hidden_TD[part])
            d_CV, losses = _chunk_gradient(logits_CV.float(), terms, part, any(needs))
            sums += losses
            if d_CV is None:
                continue
            d_CV = d_CV.to(logits_CV.dtype)  # as autograd would do
            if d_hidden is not None:
                d_hidden[part] = d_CV @ weight_VD
            if d_weight is not None:
                d_weight += d_CV.T @ hidden_TD[part]
            if d_bias is not None:
                d_bias += d_CV.sum(0, dtype=torch.float32)
        d_weight = None if d_weight is None else d_weight.to(weight_VD.dtype)
        d_bias = None if d_bias is None or bias_V is None else d_bias.to(bias_V.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        weights = torch.tensor([weight for weight, _ in terms], dtype=torch.float64, device=sums.device)
        total, sums = (weights * sums).sum().float(), sums.float()
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Any, ...]:
        gradients = [None if saved is None else saved * scale.to(saved.dtype) for saved in ctx.saved_tensors]
        return (*gradients, None, None, None)


def _chunk_gradient(
    logits_CV: Tensor, terms: Sequence[tuple[float, Term]], part: slice, grad: bool
) -> tuple[Tensor | None, Tensor]:
    """Compute the weighted gradient (C, V) of a chunk, and the sum of each term."""
    total: Tensor | None = None
    losses = []
    for weight, term in terms:
        loss_C, d_CV = term(logits_CV, part, grad)
        losses.append(loss_C.sum(dtype=torch.float64))
        if d_CV is not None:
            d_CV = d_CV if weight == 1 else d_CV.mul_(weight)
            total = d_CV if total is None else total.add_(d_CV)
    return total, torch.stack(losses)


@torch.no_grad()
def top_k(hidden_TD: Tensor, head: Head, k: int, temperature: float, rows: int | None = None) -> TopK:
    """Compute the K most likely tokens of each position with their logits, and the logsumexp of all other logits.

    Args:
        hidden_TD: final hidden states.
        head: the LM head.
        k: K, below V.
        temperature: the temperature for the logsumexp of the other logits.
        rows: tokens per chunk; None uses `chunk_rows`.
    """
    parts: list[TopK] = []
    for part in chunks(len(hidden_TD), rows or chunk_rows(head.weight_VD)):
        logits_CV = head.logits(hidden_TD[part])
        top = logits_CV.topk(k, dim=-1)
        others_CV = logits_CV.float() / temperature
        others_CV.scatter_(-1, top.indices, -torch.inf)
        parts.append(TopK(top.indices, top.values, others_CV.logsumexp(-1)))
    return TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))


@cache
def _liger() -> Any:
    """Return Liger's module; None if it is not installed."""
    try:
        return importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    except ImportError:
        return None


def can_use_liger(hidden_TD: Tensor) -> bool:
    """Return whether Liger's kernel is installed and supports these hidden states."""
    return hidden_TD.device.type == "cuda" and _liger() is not None


def liger_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor) -> Tensor:
    """Compute Σ_t -log softmax(W h_t + b)[label_t] over labels that are not MASKED, a scalar in fp32."""
    loss = _liger().LigerFusedLinearCrossEntropyLoss(ignore_index=MASKED, reduction="sum")
    total: Tensor = loss(weight_VD, hidden_TD, labels_T, bias_V)
    return total.float()
