"""Perplexity, and divergence from the original."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.small import small_model
from support.tiny_models import EVERY
from torch import nn
from transformers import Qwen2MoeForCausalLM

from recondense.errors import UserError
from recondense.evaluation.perplexity import kl_divergence, perplexity
from recondense.operations import Prune
from recondense.plan import Plan
from recondense.surgery.apply import apply

WINDOWS = torch.randint(1, 257, (5, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Qwen2MoeForCausalLM:
    return small_model()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity_is_the_mean_over_predicted_tokens(model: Qwen2MoeForCausalLM, batch_size: int) -> None:
    metrics = perplexity(model, WINDOWS, batch_size)
    with torch.no_grad():
        expected = model(input_ids=WINDOWS, labels=WINDOWS).loss.item()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics == {"loss": metrics["loss"], "perplexity": math.exp(metrics["loss"])}


def test_perplexity_does_not_depend_on_chunks(model: Qwen2MoeForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    unchunked = perplexity(model, WINDOWS, 4)
    monkeypatch.setattr("recondense.evaluation.perplexity.CHUNK_ELEMENTS", 3 * 257)
    assert perplexity(model, WINDOWS, 4)["loss"] == pytest.approx(
        unchunked["loss"], rel=1e-7
    )  # products of other sizes


def test_divergence_from_the_original(model: Qwen2MoeForCausalLM) -> None:
    other = small_model(seed=1)

    @contextmanager
    def original() -> Iterator[None]:
        """The same object with the layers of the other model."""
        backbone, model.model = model.model, other.model
        yield
        model.model = backbone

    metrics = perplexity(model, WINDOWS, 2, reference=original, description="evaluating")
    assert metrics["loss"] == perplexity(model, WINDOWS, 2)["loss"]
    with torch.no_grad(), original():
        log_p = model(input_ids=WINDOWS).logits[:, :-1].double().log_softmax(-1)
    with torch.no_grad():
        log_q = model(input_ids=WINDOWS).logits[:, :-1].double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert expected > 0.1 and metrics["kl_to_original"] == pytest.approx(expected, rel=1e-5)


def test_a_model_does_not_diverge_from_itself(model: Qwen2MoeForCausalLM) -> None:
    @contextmanager
    def original() -> Iterator[None]:
        yield

    assert perplexity(model, WINDOWS, 2, reference=original)["kl_to_original"] == 0.0


@pytest.mark.parametrize("change", [1e-4, 1e-2, 1.0, 30.0])
def test_a_small_kl_keeps_its_digits(change: float) -> None:
    generator = torch.Generator().manual_seed(0)
    original = 3 * torch.randn(64, 300, generator=generator)
    logits = original + change * torch.randn(64, 300, generator=generator)
    log_p, log_q = original.double().log_softmax(-1), logits.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(
        kl_divergence(original, logits).double(), expected, rtol=2e-3 if change < 1e-3 else 1e-5, atol=0
    )


def test_kl_of_distant_logits_is_finite() -> None:
    original = torch.tensor([[0.0, -200.0, 1.0], [0.0, 0.0, 0.0]])
    logits = torch.tensor([[-200.0, 0.0, -150.0], [0.0, 0.0, 0.0]])
    log_p, log_q = original.double().log_softmax(-1), logits.double().log_softmax(-1)
    torch.testing.assert_close(kl_divergence(original, logits).double(), (log_p.exp() * (log_p - log_q)).sum(-1))


def test_modes_of_modules_are_restored(model: Qwen2MoeForCausalLM) -> None:
    layer = model.model.layers[0]
    layer.train()
    before = [module.training for module in model.modules()]
    perplexity(model, WINDOWS[:1], 1)
    assert [module.training for module in model.modules()] == before and any(before) and not all(before)
    model.eval()


def test_an_original_in_training_mode_is_measured_in_evaluation_mode() -> None:
    """A Trainer leaves it so; router noise would then give other figures at each call."""
    model = EVERY["mixtral"](router_jitter_noise=0.3)
    student = apply(model, Plan("tiny", (Prune(1, (0, 2, 3, 5)),)))
    expected = perplexity(model, WINDOWS % 50, 2, student.original)
    model.train()
    for block in student.originals.values():
        block.train()
    for _ in range(2):
        assert perplexity(model, WINDOWS % 50, 2, student.original) == expected
    assert model.training and all(block.training for block in student.originals.values())


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_windows_that_predict_nothing_are_refused(model: Qwen2MoeForCausalLM, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one window of two tokens"):
        perplexity(model, torch.zeros(shape, dtype=torch.long), 1)


def test_logits_that_are_not_finite_are_an_error() -> None:
    broken = small_model()
    nn.init.constant_(broken.model.norm.weight, math.nan)
    with pytest.raises(
        UserError, match=r"perplexity: the original: its logits are not finite \(the mean loss over 75 "
    ):
        perplexity(broken, WINDOWS, 4, name="the original")
