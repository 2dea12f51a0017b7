"""Refits on every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.plain_moe import (
    EVEN,
    FOUR,
    PAIRS,
    RANKS,
    UNEVEN,
)
from support.tiny_models import EVERY, recorded, texts
from torch import Tensor

from recondense.operations import Condense, Constant, Factorize, Merge, Narrow, Operation, Prune, Refit
from recondense.plan import Plan
from recondense.surgery import execute


@torch.no_grad()
def states_after(model: Any, layer: int) -> Tensor:
    """The hidden states after a decoder layer, of all calibration texts one after another."""
    seen: list[Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(lambda module, args, output: seen.append(output))
    for text in texts():
        model(input_ids=torch.tensor([text]), use_cache=False)
    handle.remove()
    return torch.cat([(output[0] if isinstance(output, tuple) else output)[0] for output in seen]).double()


REFITS: dict[str, tuple[Operation, Operation]] = {
    "prune": (Prune(1, FOUR), Refit(1, "down_proj", 1e-3)),
    "constant": (Constant(1, FOUR), Refit(1, "down_proj", 1e-3)),
    "merge": (Merge(1, *PAIRS), Refit(1, "down_proj", 1e-3)),
    "factorize": (Factorize(1, RANKS), Refit(1, "down_proj", 1e-3)),
    "narrow": (Narrow.from_channels(1, EVEN), Refit(1, "down_proj", 1e-3)),
    "narrow unlike": (Narrow.from_channels(1, UNEVEN), Refit(1, "down_proj", 1e-3)),
    "condense": (Condense(1, (3, 0), (0.4, 0.2)), Refit(1, "down_proj", 1e-3)),
    "coefficients": (Condense(1, (3, 0), (0.4, 0.2)), Refit(1, "coefficients", 1e-3)),
}


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("name", REFITS)
def test_a_refit_brings_hidden_states_nearer(name: str, family: str) -> None:
    """By as much as it reports."""
    model, (operation, refit) = EVERY[family](), REFITS[name]
    original = states_after(model, 1)
    originals = execute.execute(model, Plan("tiny", (operation,)), lambda: recorded(model))
    before = (states_after(model, 1) - original).norm()
    report = execute.refit(model, Plan("tiny", (refit,)), originals, lambda: recorded(model))[1]
    after = (states_after(model, 1) - original).norm()
    assert after < 0.999 * before
    assert report["error_after"] / report["error_before"] == pytest.approx(float(after / before), rel=1e-3)
