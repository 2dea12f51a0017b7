"""The ridge that is chosen on held-out tokens, against a plain search with torch's least squares."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from recondense.surgery.least_squares import RIDGES, Unit, solve

TOKENS, WIDTH, BATCHES = 24, 12, 3


def problem(difference: float, noise: float) -> tuple[nn.Linear, list[Tensor], list[Tensor]]:
    """A linear block, its inputs, and targets of a block that differs a little, plus noise."""
    torch.manual_seed(0)
    block, other = nn.Linear(WIDTH, 5, bias=False), torch.randn(5, WIDTH)
    inputs = [torch.randn(TOKENS, WIDTH) * torch.logspace(0, -3, WIDTH) for _ in range(BATCHES)]
    targets = [x @ (block.weight.detach() + difference * other).T + noise * torch.randn(TOKENS, 5) for x in inputs]
    if difference < 0:  # what the first tokens show is the opposite of what the others need
        for x, target in zip(inputs, targets, strict=True):
            target[3 * TOKENS // 4 :] = x[3 * TOKENS // 4 :] @ (block.weight.detach() - difference * other).T
    return block, inputs, targets


def solved(block: nn.Linear, inputs: list[Tensor], targets: list[Tensor], ridge: object) -> Tensor:
    unit = Unit(block.weight, lambda x: (torch.arange(len(x)), x))
    with torch.no_grad():
        solve(block, [unit], inputs, targets, [], ridge, WIDTH)  # type: ignore[arg-type]
    return block.weight.detach().double()


def least_squares(inputs: list[Tensor], residuals: list[Tensor], ridge: float) -> Tensor:
    """The change of the weights, with the ridge as further rows."""
    h, r = torch.cat(inputs).double(), torch.cat(residuals).double()
    penalty = (ridge * float((h.T @ h).diagonal().mean())) ** 0.5
    rows = torch.cat((h, penalty * torch.eye(WIDTH, dtype=torch.float64)))
    return torch.linalg.lstsq(
        rows, torch.cat((r, torch.zeros(WIDTH, 5, dtype=torch.float64))), driver="gelsd"
    ).solution.T


@pytest.mark.parametrize(
    ("difference", "noise", "chosen"),
    [(0.1, 1e-4, 1e-3), (0.1, 0.01, 1e-2), (0.1, 0.1, 0.1), (0.1, 0.2, 1.0), (-1.0, 0.0, math.inf)],
)
def test_the_ridge_has_the_smallest_error_on_the_last_quarter_of_each_batch(
    difference: float, noise: float, chosen: float
) -> None:
    block, inputs, targets = problem(difference, noise)
    before = block.weight.detach().double()
    residuals = [target - x @ before.float().T for x, target in zip(inputs, targets, strict=True)]
    cut = 3 * TOKENS // 4
    errors = {math.inf: float(torch.cat([r[cut:] for r in residuals]).double().square().sum())}
    for ridge in RIDGES:
        change = least_squares([x[:cut] for x in inputs], [r[:cut] for r in residuals], ridge)
        pairs = zip(inputs, residuals, strict=True)
        errors[ridge] = sum(float((r[cut:].double() - x[cut:].double() @ change.T).square().sum()) for x, r in pairs)
    best = min(errors, key=errors.__getitem__)
    assert best == chosen
    expected = before if best == math.inf else before + least_squares(inputs, residuals, best)
    torch.testing.assert_close(solved(block, inputs, targets, "auto"), expected, rtol=1e-3, atol=1e-4)
