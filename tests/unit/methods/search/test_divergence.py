"""The Jensen-Shannon divergence against its definition in many digits, scipy, and closed forms."""

from __future__ import annotations

import math

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon  # type: ignore[import-untyped]
from torch import Tensor

from recondense.methods.search.divergence import Reference, jensen_shannon


def js(reference_TD: Tensor, difference_CTD: Tensor, apart: bool = False) -> Tensor:
    return jensen_shannon(Reference.prepare(reference_TD.float()), difference_CTD, apart)


SCALES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0, 30.0)


def js_in_many_digits(reference_TD: Tensor, difference_TD: Tensor) -> list[mpmath.mpf]:
    """The definition word by word, in 120 digits: ½[KL(p‖m) + KL(q‖m)] with 1e-10 added everywhere."""
    with mpmath.workdps(120):
        divergences = []
        for logits, moved in zip(reference_TD.double().tolist(), difference_TD.double().tolist(), strict=True):
            p = _softmax([mpmath.mpf(x) for x in logits])
            q = _softmax([mpmath.mpf(x) + mpmath.mpf(d) for x, d in zip(logits, moved, strict=True)])
            m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
            divergences.append((_kl(p, m) + _kl(q, m)) / 2)
        return divergences


def _softmax(logits: list[mpmath.mpf]) -> list[mpmath.mpf]:
    exponentials = [mpmath.exp(x - max(logits)) for x in logits]
    total = mpmath.fsum(exponentials)
    return [x / total for x in exponentials]


def _kl(p: list[mpmath.mpf], q: list[mpmath.mpf]) -> mpmath.mpf:
    small = mpmath.mpf("1e-10")
    return mpmath.fsum((a + small) * mpmath.log((a + small) / (b + small)) for a, b in zip(p, q, strict=True))


def states(outlier: float, num: int = 8, width: int = 32) -> Tensor:
    torch.manual_seed(1)
    reference_TD = torch.randn(num, width)
    if outlier:
        reference_TD[:, 5] = outlier
    return reference_TD


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("outlier", [0.0, 30.0, 300.0])
def test_jensen_shannon_keeps_its_digits(outlier: float, scale: float) -> None:
    """However close the two distributions are, and beside an outlier dimension; fp32 ends at 1e-38."""
    reference_TD = states(outlier)
    difference_TD = torch.randn(reference_TD.shape) * scale
    expected = js_in_many_digits(reference_TD, difference_TD)
    divergences = js(reference_TD, difference_TD.unsqueeze(0))[0]
    assert divergences.dtype == torch.float32
    for actual, exact in zip(divergences.tolist(), expected, strict=True):
        assert abs(actual - exact) <= 1e-4 * exact + 1e-38, (actual, float(exact))


def test_jensen_shannon_of_one_far_and_unlikely_dimension() -> None:
    """An improbable dimension moves far, the others hardly: in fp64 the definition would give only rounding errors."""
    reference_TD = states(0.0)
    reference_TD[:, 3] = -40.0
    difference_TD = torch.randn(reference_TD.shape) * 1e-6
    difference_TD[:, 3] = 12.0
    expected = js_in_many_digits(reference_TD, difference_TD)
    assert float(expected[0]) < 1e-12
    divergences = js(reference_TD, difference_TD.unsqueeze(0))[0]
    for actual, exact in zip(divergences.tolist(), expected, strict=True):
        assert abs(actual - exact) <= 1e-4 * exact, (actual, float(exact))


def test_jensen_shannon_is_zero_without_a_difference_and_ln2_at_most() -> None:
    reference_TD = states(0.0)
    assert js(reference_TD, torch.zeros(1, *reference_TD.shape)).eq(0).all()
    apart = js(torch.tensor([[200.0, 0.0]]), torch.tensor([[[-400.0, 0.0]]]))
    assert apart.item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_jensen_shannon_equals_scipys(scale: float) -> None:
    reference_TD = states(0.0)
    difference_CTD = torch.randn(3, *reference_TD.shape) * scale
    p = reference_TD.double().softmax(-1).expand_as(difference_CTD).numpy()
    q = (reference_TD + difference_CTD).double().softmax(-1).numpy()
    np.testing.assert_allclose(js(reference_TD, difference_CTD), jensenshannon(p, q, axis=-1) ** 2, rtol=2e-5)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
def test_a_shift_of_all_dimensions_changes_nothing(scale: float) -> None:
    reference_TD = states(30.0)
    difference_TD = (torch.randn(reference_TD.shape) * scale * 1024).round() / 1024  # so that adding 64 is exact
    plain = js(reference_TD, difference_TD.clone().unsqueeze(0))
    for shift in (64.0, -16.0):
        assert torch.equal(plain, js(reference_TD, (difference_TD + shift).unsqueeze(0)))
    moved = js((reference_TD * 1024).round() / 1024 + 8, difference_TD.clone().unsqueeze(0))
    still = js((reference_TD * 1024).round() / 1024, difference_TD.clone().unsqueeze(0))
    torch.testing.assert_close(moved, still, rtol=1e-5, atol=0)


@pytest.mark.parametrize("step", [2.0**-12, 2.0**-6, 0.5])
def test_jensen_shannon_is_symmetric(step: float) -> None:
    """JS(p, q) = JS(q, p), for numbers with exact sums; a tiny change counts as much in both directions."""
    reference_TD = (states(0.0) * 256).round() / 256
    difference_TD = torch.randint(-3, 4, reference_TD.shape) * step
    there = js(reference_TD, difference_TD.clone().unsqueeze(0))
    back = js(reference_TD + difference_TD, -difference_TD.unsqueeze(0))
    torch.testing.assert_close(there, back, rtol=1e-5, atol=0)
    away = js(reference_TD, -difference_TD.unsqueeze(0))
    torch.testing.assert_close(there, away, rtol=2 * step, atol=0)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("width", [32, 257, 2048])
def test_chunks_give_the_same_bits(width: int, apart: bool) -> None:
    """Candidates and tokens are cut into chunks as memory allows: scores must not depend on it."""
    torch.manual_seed(0)
    reference_TD, difference_CTD = torch.randn(21, width), torch.randn(24, 21, width) * 0.1
    difference_CTD[3, 4] *= 200  # one candidate that is far away
    together = js(reference_TD, difference_CTD.clone(), apart)
    for group in (1, 2, 7):
        parts = [js(reference_TD, part.clone(), apart) for part in difference_CTD.split(group)]
        difference = (torch.cat(parts) - together).abs().max().item()
        assert torch.equal(torch.cat(parts), together), f"groups of {group} candidates differ by {difference:.2g}"
    for rows in (1, 4):
        slices = [slice(row, row + rows) for row in range(0, 21, rows)]
        parts = [js(reference_TD[tokens], difference_CTD[:, tokens].clone(), apart) for tokens in slices]
        difference = (torch.cat(parts, dim=1) - together).abs().max().item()
        assert torch.equal(torch.cat(parts, dim=1), together), f"{rows} tokens at a time differ by {difference:.2g}"


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 3.0, 10.0, 30.0])
@pytest.mark.parametrize("outlier", [0.0, 3.0])
def test_the_shorter_computation_for_distributions_that_are_far_apart(outlier: float, scale: float) -> None:
    reference_TD = states(outlier)
    difference_TD = torch.randn(reference_TD.shape) * scale
    expected = [float(true) for true in js_in_many_digits(reference_TD, difference_TD)]
    divergences = js(reference_TD, difference_TD.unsqueeze(0), apart=True)[0]
    np.testing.assert_allclose(divergences, expected, rtol=1e-4)


@pytest.mark.parametrize("fall", [60.0, 150.0, 400.0])
@pytest.mark.parametrize("apart", [False, True])
def test_the_largest_dimension_may_fall_below_all_others(apart: bool, fall: float) -> None:
    """The original has a massive activation that a candidate lacks, or has in another dimension."""
    reference_TD = states(0.0)
    reference_TD[:, 3] += fall
    difference_TD = torch.randn(reference_TD.shape)
    difference_TD[::2, 3] -= 1.5 * fall
    difference_TD[::4, 7] += 2 * fall
    expected = [float(true) for true in js_in_many_digits(reference_TD, difference_TD)]
    divergences = js(reference_TD, difference_TD.clone().unsqueeze(0), apart=apart)[0]
    np.testing.assert_allclose(divergences[::2], expected[::2], rtol=1e-4)
    np.testing.assert_allclose(divergences, expected, rtol=1e-4, atol=1e-9)
