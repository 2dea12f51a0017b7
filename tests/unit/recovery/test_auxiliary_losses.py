"""Training losses against other libraries and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from support.losses import cross_entropy, forward_kl
from support.tiny_models import VOCAB, qwen2_moe, windows
from torch.distributions import Categorical, kl_divergence

from recondense.recovery.auxiliary_losses import feature_matching


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_forward_kl_equals_torchs(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, VOCAB) * 3, torch.randn(2, 5, VOCAB) * 3
    expected = kl_divergence(Categorical(logits=teacher / temperature), Categorical(logits=student / temperature))
    loss = forward_kl(student, teacher, temperature)
    torch.testing.assert_close(loss, expected.mean() * temperature**2, rtol=1e-5, atol=0)
    assert forward_kl(teacher, teacher, temperature).item() == 0


def test_forward_kl_gradient_is_the_difference_of_the_distributions() -> None:
    """d/ds τ²·KL = τ·(softmax(s/τ) − softmax(t/τ)), over the number of positions."""
    torch.manual_seed(0)
    student = torch.randn(2, 3, VOCAB, requires_grad=True)
    teacher = torch.randn(2, 3, VOCAB)
    forward_kl(student, teacher, 2.0).backward()  # type: ignore[no-untyped-call]
    expected = 2.0 * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 6
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-4, atol=1e-7)


def test_losses_are_summed_in_fp32() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 4, VOCAB).bfloat16(), torch.randn(1, 4, VOCAB).bfloat16()
    ids = windows(1, 4)
    assert forward_kl(student, teacher).dtype == cross_entropy(student, ids).dtype == torch.float32
    torch.testing.assert_close(forward_kl(student, teacher), forward_kl(student.float(), teacher.float()))
    torch.testing.assert_close(cross_entropy(student, ids), cross_entropy(student.float(), ids))


def test_cross_entropy_equals_that_of_transformers() -> None:
    model, ids = qwen2_moe(), windows(3, 11)
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(cross_entropy(output.logits, ids), output.loss, rtol=1e-6, atol=0)


def test_feature_matching_closed_form() -> None:
    """The loss of a student that is (1 + a)·teacher is a², whatever the layer's scale; layers weigh the same."""
    torch.manual_seed(0)
    teacher = [torch.randn(2, 3, 8), 100 * torch.randn(2, 3, 8)]
    student = [1.5 * teacher[0], 0.9 * teacher[1]]
    assert feature_matching(student, teacher).item() == pytest.approx((0.25 + 0.01) / 2, rel=1e-5)
    assert feature_matching(teacher, teacher).item() == 0
    assert math.isfinite(feature_matching([torch.ones(1, 1, 2)], [torch.zeros(1, 1, 2)]).item())
    with pytest.raises(ValueError, match="shorter"):
        feature_matching(student, teacher[:1])
