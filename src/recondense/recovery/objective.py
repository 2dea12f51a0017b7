"""The objective of a recovery: pure functions that compute losses from a student's states and a teacher's output.

Shapes: B windows of a batch, S tokens of a window, T tokens that count, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from recondense.config.schema import RecoveryConfig
from recondense.config.types import ends_of
from recondense.models.decoder import Head
from recondense.recovery.auxiliary_losses import feature_matching
from recondense.recovery.losses import CrossEntropy, TeacherDivergence, Term, sum_in_chunks
from recondense.recovery.shared_passes import CountedTokens
from recondense.recovery.teachers import TeacherOutput

Losses = dict[str, Tensor]
METRICS = {"forward_kl": "kl"}  # divergences whose metric has another name than the setting


class Shares(NamedTuple):
    """The shares of the losses beside the divergence in one optimizer step; the divergence has the rest."""

    cross_entropy: float
    hidden: float


def shares_at(settings: RecoveryConfig, step: int) -> Shares:
    """Return the shares of an optimizer step. A share that is a pair goes linearly from the first step to the last.

    Args:
        settings: the settings of the objective.
        step: the number of the step, from 0.
    """
    done = step / max(1, settings.steps - 1)
    pairs = ends_of(settings.cross_entropy_share), ends_of(settings.hidden_share)
    return Shares(*(first + done * (last - first) for first, last in pairs))


class StudentOutput(NamedTuple):
    """A student's output for a batch.

    Args:
        hidden_TD: the final hidden states of the tokens that count; the head computes logits from them.
        states: the hidden states (B, S, D) after the same layers as the teacher's.
    """

    hidden_TD: Tensor
    states: Sequence[Tensor] = ()


def training_losses(
    student: StudentOutput,
    head: Head,
    tokens: CountedTokens,
    teacher: TeacherOutput,
    settings: RecoveryConfig,
    *,
    shares: Shares | None = None,
    mask_BS: Tensor | None = None,
    weight: Tensor | None = None,
    mean: Callable[[Losses], Losses] = lambda values: values,
) -> Losses:
    """Compute the objective (`loss`) and its parts, in nats per token.

    Without a teacher's target, the objective is the cross-entropy. Otherwise it is
    (1 − a − b)·divergence + a·cross-entropy + b·hidden, with the shares a and b.

    Args:
        student: the student's output.
        head: the student's head.
        tokens: the tokens that count.
        teacher: the teacher's output.
        settings: the settings of the objective.
        shares: the shares of this step, see `shares_at`; None for those of the first step.
        mask_BS: the positions whose hidden states are compared (bool); None for all.
        weight: three numbers of targets (3,), needed if the parts of an optimizer step (batches, processes) have
            different sizes: those of this part × parts of the step, those of this batch × batches of the step, and
            those of the step. The mean of the parts' losses is then the mean over the targets of the step. They are
            integers, because training in bf16 would round other numbers.
        mean: averages values over the processes that share a batch.
    """
    shares = shares_at(settings, 0) if shares is None else shares
    losses = prediction_losses(student.hidden_TD, head, tokens, teacher, settings, shares)
    of_part, of_batch = (1.0, 1.0) if weight is None else weight[:2].float() / weight[2].float()
    if weight is not None:
        losses = {name: of_part * value for name, value in losses.items()}
    if settings.compares_states and teacher.target is not None:
        # Relative to the teacher's states of this batch, because those of the step's later batches are not known yet.
        losses["hidden"] = of_batch * feature_matching(student.states, teacher.states, mask_BS, mean)
        losses["loss"] = losses["loss"] + shares.hidden * losses["hidden"]
    return losses


def prediction_losses(
    hidden_TD: Tensor,
    head: Head,
    tokens: CountedTokens,
    teacher: TeacherOutput,
    settings: RecoveryConfig,
    shares: Shares,
) -> Losses:
    """Compute each loss as a mean over its tokens, and their weighted sum `loss`."""
    terms: dict[str, tuple[float, int, Term]] = {}
    entropy = CrossEntropy(tokens.labels_T)
    if teacher.target is None:
        terms["cross_entropy"] = 1.0, tokens.num_labels, entropy
    else:
        divergence = TeacherDivergence(settings.divergence, teacher.target, settings.temperature)
        share = 1 - sum((shares.cross_entropy, shares.hidden))
        terms[METRICS.get(settings.divergence, settings.divergence)] = share, len(tokens), divergence
        if any(ends_of(settings.cross_entropy_share)):
            terms["cross_entropy"] = shares.cross_entropy, tokens.num_labels, entropy
    counts = [max(1, count) for _, count, _ in terms.values()]
    weighted = [(share / count, term) for (share, _, term), count in zip(terms.values(), counts, strict=True)]
    loss, sums = sum_in_chunks(weighted, hidden_TD, head)
    losses = {name: total / count for name, total, count in zip(terms, sums, counts, strict=True)}
    if teacher.target is None:
        losses["cross_entropy"] = loss
    return {**losses, "loss": loss}


def validation_losses(hidden_TD: Tensor, head: Head, tokens: CountedTokens, teacher: TeacherOutput) -> Losses:
    """Compute cross-entropy (`loss`) and, with a teacher, forward KL (`kl`) at temperature 1, in nats per token."""
    terms: list[tuple[float, Term]] = [(1.0, CrossEntropy(tokens.labels_T))]
    if teacher.target is not None:
        terms.append((1.0, TeacherDivergence("forward_kl", teacher.target)))
    _, sums = sum_in_chunks(terms, hidden_TD, head)
    losses = {"loss": sums[0] / max(1, tokens.num_labels)}
    return losses if teacher.target is None else {**losses, "kl": sums[1] / max(1, len(tokens))}
