"""The weight of a batch in its optimiser step."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import windows
from torch import Tensor

from recondense.data.labels import MASKED, target_mask
from recondense.data.loader import ShuffledWindows

TARGETS = (1, 7, 7, 1, 3, 2, 7, 5)


def table(targets: tuple[int, ...] = TARGETS) -> dict[str, Tensor]:
    """Windows of 8 tokens, in which the last `targets` tokens are to be predicted."""
    ids = windows(len(targets), 8)
    counted = torch.arange(8) >= 8 - torch.tensor(targets)[:, None]
    return {"input_ids": ids, "labels": torch.where(counted, ids, MASKED)}


def loader(targets: tuple[int, ...], batch_size: int, num_batches: int, accumulate: int) -> ShuffledWindows:
    return ShuffledWindows(table(targets), batch_size, num_batches, 3, lambda: 0, accumulate)


@pytest.mark.parametrize(("num_batches", "steps"), [(6, [(0, 3), (3, 6)]), (5, [(0, 3), (3, 5)])])
def test_the_batches_of_a_step_have_a_mean_weight_of_one(num_batches: int, steps: list[tuple[int, int]]) -> None:
    """Also where a step continues after the last window, and where the last step has fewer batches."""
    batches = list(loader((1, 7, 7, 1, 3), 2, num_batches, 3))
    for batch in batches:
        in_part, in_batch, in_step = batch["weight"].tolist()
        assert batch["weight"].dtype == torch.int64, "bf16 would round others"
        assert in_part == in_batch and in_part > 0 < in_step
    for first, end in steps:
        counts = [int(target_mask(batch["labels"]).sum()) for batch in batches[first:end]]
        weights = [float(batch["weight"][0] / batch["weight"][2]) for batch in batches[first:end]]
        assert weights == pytest.approx([count * (end - first) / sum(counts) for count in counts])


def test_equal_batches_weigh_exactly_one() -> None:
    for batch in loader((5,) * 7, 2, 6, 3):
        assert len(set(batch["weight"].tolist())) == 1
    assert all("weight" not in batch for batch in loader(TARGETS, 2, 6, 1))
    plain = ShuffledWindows({"input_ids": windows(7, 8)}, 2, 6, 3, lambda: 0, 3)
    assert all(set(batch) == {"input_ids"} for batch in plain)


def test_a_batch_without_targets_counts_nothing() -> None:
    weights = [batch["weight"].tolist() for batch in loader((0, 7), 1, 2, 2)]
    assert sorted(in_part for in_part, *_ in weights) == [0, 14] and {in_step for *_, in_step in weights} == {7}
    none = [batch["weight"].tolist() for batch in loader((0, 0), 1, 2, 2)]
    assert none == [[0, 0, 1]] * 2
