"""How many channels each expert keeps, against brute force."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from recondense.methods.search.widths import (
    allocate,
    resolve_multiple,
    retained_channels,
    width_steps,
)


def scores(seed: int = 0, width: int = 8) -> dict[int, Tensor]:
    """Two layers of two experts."""
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.rand(2, width, generator=generator) for layer in (1, 4)}


def lost(values: dict[int, Tensor], widths: dict[int, list[int]]) -> float:
    """The sum of the scores of the removed channels."""
    return sum(
        float(row.double().sort().values[: len(row) - width].sum())
        for layer, rows in values.items()
        for row, width in zip(rows, widths[layer], strict=True)
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("allocation", "groups"), [("global", 4), ("layer", 2), ("uniform", 1)])
def test_no_other_widths_of_the_same_total_lose_less(allocation: str, groups: int, seed: int) -> None:
    """All widths of all groups that remove as many channels as the allocation does."""
    values = scores(seed)
    for channels in (1, 5, 8, 13, 21, 24):
        widths = allocate(values, channels, 2, allocation)
        removed = sum(8 - width for row in widths.values() for width in row)
        assert channels <= removed < channels + 2 * 4 // groups
        assert all(width % 2 == 0 and width >= 2 for row in widths.values() for width in row)
        assert len({tuple(row) for row in widths.values()}) == 1 or allocation != "uniform"
        assert all(len(set(row)) == 1 for row in widths.values()) or allocation == "global"
        trials = product((2, 4, 6, 8), repeat=groups)
        per_expert = ([width for width in trial for _ in range(4 // groups)] for trial in trials)
        same = (trial for trial in per_expert if sum(8 - width for width in trial) == removed)
        best = min(lost(values, {1: trial[:2], 4: trial[2:]}) for trial in same)
        assert lost(values, widths) == pytest.approx(best)


def test_layers_of_different_widths_get_one_width() -> None:
    """The wider ones lose channels first. A width that is no multiple is rounded down."""
    values = {0: torch.rand(2, 12), 3: torch.rand(3, 7)}
    assert allocate(values, 0, 4) == {0: [12] * 2, 3: [7] * 3}
    assert allocate(values, 1, 4) == {0: [8] * 2, 3: [7] * 3}
    assert allocate(values, 9, 4) == {0: [4] * 2, 3: [4] * 3}
    assert width_steps(7, 4) == [7, 4] and width_steps(12, 4) == [12, 8, 4] and width_steps(4, 4) == [4]


def test_the_channels_with_the_largest_scores_stay() -> None:
    values = torch.tensor([[0.3, 0.1, 0.9, 0.5], [0.0, 0.0, 0.0, 0.0]])
    assert retained_channels(values, [2, 4]) == [[2, 3], [0, 1, 2, 3]]
    assert retained_channels(values, [3, 2]) == [[0, 2, 3], [2, 3]]


@pytest.mark.parametrize(("width", "multiple"), [(1408, 64), (768, 64), (14336, 64), (256, 32), (64, 8), (48, 8)])
def test_automatic_multiples(width: int, multiple: int) -> None:
    assert resolve_multiple("auto", width) == multiple and resolve_multiple(24, width) == 24


@pytest.mark.parametrize("width", [0, 9, 13])
def test_a_width_that_does_not_exist_is_a_defect(width: int) -> None:
    """A slice with such a width would silently retain other channels."""
    with pytest.raises(AssertionError):
        retained_channels(scores()[1], [8, width])
