"""Losses in chunks of tokens against plain torch on all logits: values, gradients and memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recondense.data.labels import MASKED, next_labels
from recondense.evaluation.profiling import peak_tensor_bytes
from recondense.models.decoder import Head
from recondense.recovery import losses
from recondense.recovery.losses import (
    CrossEntropy,
    Divergence,
    Hidden,
    TeacherDivergence,
    Term,
    TopK,
    sum_in_chunks,
    top_k,
)

T, V, D = 37, 101, 16
KINDS: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "js")


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def plain_divergence(kind: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The definitions, by autograd."""
    if kind == "forward_kl":
        return kl(log_p, log_q)
    if kind == "reverse_kl":
        return kl(log_q, log_p)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


class Case:
    """Hidden states of a student and a teacher, and their heads."""

    def __init__(self, trained: bool = True, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(T, D, dtype=dtype, requires_grad=True)
        self.teacher_hidden = torch.randn(T, D, dtype=dtype)
        self.head = nn.Linear(D, V, bias=bias, dtype=dtype).requires_grad_(trained)
        self.other = nn.Linear(D, V, bias=bias, dtype=dtype).requires_grad_(False)
        for head in (self.head, self.other):
            head.weight.data *= 4
        self.labels = torch.randint(V, (T,))
        self.labels[[0, 5, T - 1]] = MASKED

    def heads(self) -> tuple[Head, Head]:
        return Head(self.head.weight, self.head.bias), Head(self.other.weight, self.other.bias)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        inputs = [tensor for tensor in (self.hidden, *self.head.parameters()) if tensor.requires_grad]
        return list(torch.autograd.grad(loss, inputs))

    def plain(self, kind: str, temperature: float) -> Tensor:
        log_p = (self.other(self.teacher_hidden) / temperature).log_softmax(-1)
        log_q = (self.head(self.hidden) / temperature).log_softmax(-1)
        return temperature**2 * plain_divergence(kind, log_p, log_q)


@pytest.mark.parametrize(("trained", "bias"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("rows", [1, 8, T, 10 * T])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_divergences_equal_the_plain_ones(
    kind: Divergence, temperature: float, rows: int, trained: bool, bias: bool
) -> None:
    case = Case(trained, bias)
    head, other = case.heads()
    term = TeacherDivergence(kind, Hidden(case.teacher_hidden, other), temperature)
    loss, sums = sum_in_chunks([(0.3, term)], case.hidden, head, rows)
    expected = case.plain(kind, temperature).sum()
    torch.testing.assert_close(sums[0], expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, 0.3 * expected, rtol=1e-6, atol=1e-6)
    for actual, reference in zip(case.gradients(3 * loss), case.gradients(0.9 * expected), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-6 * float(reference.abs().max()))


@pytest.mark.parametrize("rows", [7, T])
def test_cross_entropy_equals_torchs_also_beside_a_divergence(rows: int) -> None:
    case = Case()
    head, other = case.heads()
    terms: list[tuple[float, Term]] = [(0.5, CrossEntropy(case.labels))]
    expected = 0.5 * F.cross_entropy(case.head(case.hidden), case.labels, ignore_index=MASKED, reduction="sum")
    for _ in range(2):
        loss, sums = sum_in_chunks(terms, case.hidden, head, rows)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close((sums * torch.tensor([weight for weight, _ in terms])).sum(), loss.detach())
        for actual, reference in zip(case.gradients(loss), case.gradients(expected), strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-6 * float(reference.abs().max()))
        terms.append((0.25, TeacherDivergence("forward_kl", Hidden(case.teacher_hidden, other), 2.0)))
        plain = F.cross_entropy(case.head(case.hidden), case.labels, ignore_index=MASKED, reduction="sum")
        expected = 0.5 * plain + 0.25 * case.plain("forward_kl", 2.0).sum()


def test_in_bf16_the_gradient_is_as_good_as_autograds() -> None:
    """Against fp64 on the same bf16 numbers; sums are taken in fp32."""
    case = Case(dtype=torch.bfloat16)
    head, other = case.heads()
    loss, _ = sum_in_chunks(
        [(1.0, TeacherDivergence("forward_kl", Hidden(case.teacher_hidden, other)))], case.hidden, head, 8
    )
    log_p, log_q = (
        logits.float().log_softmax(-1) for logits in (case.other(case.teacher_hidden), case.head(case.hidden))
    )
    plain = kl(log_p, log_q).sum()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    with torch.no_grad():
        d_TV = (log_q.exp() - log_p.exp()).double()
        exact = [d_TV @ case.head.weight.double(), d_TV.T @ case.hidden.double(), d_TV.sum(0)]
    for actual, autograd, reference in zip(case.gradients(loss), case.gradients(plain), exact, strict=True):
        errors = [float((gradient.double() - reference).norm() / reference.norm()) for gradient in (actual, autograd)]
        assert errors[0] < max(1.2 * errors[1], 4e-3), errors  # bf16 rounds by 4e-3


def test_without_gradients_none_is_computed() -> None:
    case = Case()
    head, other = case.heads()
    grads = []

    def spy(logits_CV: Tensor, rows: slice, grad: bool) -> tuple[Tensor, Tensor | None]:
        grads.append(grad)
        return TeacherDivergence("js", Hidden(case.teacher_hidden, other))(logits_CV, rows, grad)

    with torch.no_grad():
        loss, _ = sum_in_chunks([(1.0, spy)], case.hidden, head, 20)
    assert not loss.requires_grad
    loss, _ = sum_in_chunks(
        [(1.0, spy)], case.hidden.detach(), Head(*(part.detach() for part in head if part is not None))
    )
    assert not loss.requires_grad and grads == [False] * 3
    assert sum_in_chunks([(1.0, spy)], case.hidden, head, 20)[0].requires_grad and grads[3:] == [True, True]


def test_a_teacher_that_is_the_student_gives_no_loss() -> None:
    case = Case()
    head, _ = case.heads()
    for kind in KINDS:
        loss, _ = sum_in_chunks(
            [(1.0, TeacherDivergence(kind, Hidden(case.hidden.detach(), head)))], case.hidden, head, 8
        )
        assert loss.item() == pytest.approx(0.0, abs=0 if kind != "js" else 1e-5)


# ---------------------------------------------------------------------------------------- stored top-k predictions


def bucket_log_probabilities(log_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """Log-probabilities of the stored tokens and of all others together, by plain sums in fp64."""
    p_TV = log_TV.double().exp()
    rest_T1 = p_TV.scatter(-1, ids_TK, 0.0).sum(-1, keepdim=True)
    return torch.cat([p_TV.gather(-1, ids_TK), rest_T1], -1).log()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_stored_predictions_give_the_divergence_over_k_plus_one_outcomes(kind: Divergence, temperature: float) -> None:
    case = Case()
    head, other = case.heads()
    predictions = top_k(case.teacher_hidden, other, 5, temperature, rows=8)
    loss, _ = sum_in_chunks([(1.0, TeacherDivergence(kind, predictions, temperature))], case.hidden, head, 8)
    log_p, log_q = (
        (logits / temperature).log_softmax(-1) for logits in (case.other(case.teacher_hidden), case.head(case.hidden))
    )
    ids = log_p.topk(5).indices
    assert torch.equal(ids, predictions.ids_TK)
    expected = (
        temperature**2
        * plain_divergence(kind, bucket_log_probabilities(log_p, ids), bucket_log_probabilities(log_q, ids)).sum()
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for actual, reference in zip(case.gradients(loss), case.gradients(expected), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-6 * float(reference.abs().max()))


def test_stored_predictions_bound_the_divergence_from_below() -> None:
    """The missing part of the forward KL is r·KL(rest ‖ rest); it shrinks with k and is zero at V - 1."""
    case = Case()
    head, other = case.heads()
    log_p, log_q = (
        logits.double().log_softmax(-1) for logits in (case.other(case.teacher_hidden), case.head(case.hidden))
    )
    for kind in KINDS:
        full = plain_divergence(kind, log_p, log_q)
        before = torch.zeros(T, dtype=torch.float64)
        for k in (1, 4, 16, 64, V - 1):
            predictions = top_k(case.teacher_hidden, other, k, 1.0)
            divergences = torch.stack(
                [
                    sum_in_chunks(
                        [(1.0, TeacherDivergence(kind, TopK(*(c[[t]] for c in predictions))))], case.hidden[[t]], head
                    )[0]
                    for t in range(T)
                ]
            ).double()
            assert (divergences <= full + 1e-5).all() and (divergences >= before - 1e-5).all(), (kind, k)
            if kind == "forward_kl":
                rests = [log_TV.scatter(-1, predictions.ids_TK, -torch.inf) for log_TV in (log_p, log_q)]
                r_T, (p, q) = rests[0].exp().sum(-1), (log_TV.log_softmax(-1) for log_TV in rests)
                missing = r_T * torch.where(p.isinf(), 0, p.exp() * (p - q)).sum(-1)
                torch.testing.assert_close(divergences, full - missing, rtol=1e-4, atol=1e-5)
            before = divergences
        torch.testing.assert_close(before, full, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ memory, kernels


@pytest.mark.parametrize("kind", ["forward_kl", "cross_entropy"])
def test_no_tensor_of_tokens_times_vocabulary_is_allocated(kind: str) -> None:
    """With a vocabulary that would make it most of the memory; published sizes are in benchmarks/losses.py."""
    torch.manual_seed(0)
    tokens, vocabulary = 1024, 32768
    hidden, teacher_hidden = torch.randn(tokens, 8, requires_grad=True), torch.randn(tokens, 8)
    head = Head(torch.randn(vocabulary, 8))
    labels = torch.randint(vocabulary, (tokens,))

    def backward() -> None:
        term = (
            CrossEntropy(labels)
            if kind == "cross_entropy"
            else TeacherDivergence("forward_kl", Hidden(teacher_hidden, head))
        )
        sum_in_chunks([(1.0, term)], hidden, head, 32)[0].backward()  # type: ignore[no-untyped-call]

    peak = peak_tensor_bytes(backward, "cpu")
    assert peak < 8 * 32 * vocabulary * 4 < tokens * vocabulary * 4 / 3


def test_ligers_kernel_is_used_where_it_is_installed_and_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with its signature: weights first, then hidden states, labels and bias."""
    calls: list[dict[str, Any]] = []

    class Loss:
        def __init__(self, ignore_index: int, reduction: str) -> None:
            calls.append({"ignore_index": ignore_index, "reduction": reduction})

        def __call__(self, weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="sum", ignore_index=MASKED)

    module = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=Loss)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=None))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.fused_linear_cross_entropy", module)
    monkeypatch.setattr(losses, "_liger", losses._liger.__wrapped__)
    case = Case()
    head, other = case.heads()
    entropy, divergence = CrossEntropy(case.labels), TeacherDivergence("forward_kl", Hidden(case.teacher_hidden, other))
    plain, sums = sum_in_chunks([(0.5, entropy)], case.hidden, head)
    assert losses._liger() is module and not losses.can_use_liger(case.hidden) and not calls  # tensors on a CPU
    monkeypatch.setattr(losses, "can_use_liger", lambda hidden: True)
    fused, fused_sums = sum_in_chunks([(0.5, entropy)], case.hidden, head)
    assert calls == [{"ignore_index": MASKED, "reduction": "sum"}]
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(fused_sums, sums)
    with torch.no_grad():
        sum_in_chunks([(0.5, entropy)], case.hidden, head)
    sum_in_chunks([(0.5, entropy), (0.5, divergence)], case.hidden, head)
    sum_in_chunks([(0.5, divergence)], case.hidden, head)
    assert len(calls) == 1


def test_without_liger_nothing_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    find: Callable[[], Any] = losses._liger.__wrapped__
    assert find() is None


def test_labels_of_the_next_token() -> None:
    assert next_labels(torch.tensor([[3, MASKED, 5]])).tolist() == [[MASKED, 5, MASKED]]
