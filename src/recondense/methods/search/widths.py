"""Decide how many channels each expert keeps: the same number everywhere, or by score. Totals meet a budget.

Legend: E experts of a layer, F expert width, K steps in which an expert becomes narrower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from recondense.errors import UserError
from recondense.models.narrowing import ROW_BYTES

ALLOCATIONS = ("uniform", "layer", "global")
LEAST = 4  # grouped products need rows of multiples of 16 bytes: four numbers, or eight in half precision
LEAST_AUTO = 8
MOST = 64  # the largest automatic multiple: tiles of matrix products, and blocks of tensor parallelism, are as wide


def resolve_multiple(setting: int | str, width: int) -> int:
    """Resolve `width_multiple`. "auto" is the largest power of two from 8 to 64 up to an eighth of the expert width."""
    if setting != "auto":
        return int(setting)
    return min(MOST, max(LEAST_AUTO, 1 << (max(1, width // 8).bit_length() - 1)))


def multiple_problems(setting: int | str) -> list[str]:
    """List the problems of `width_multiple`, as sentences."""
    if setting == "auto" or (isinstance(setting, int) and setting >= LEAST and setting % LEAST == 0):
        return []
    return [f"method.width_multiple={setting} must be a multiple of {LEAST}, or auto"]


def require_whole_rows(name: str, width: int, dtype: torch.dtype) -> None:
    """Check that rows of this many numbers are multiples of 16 bytes, which grouped products need.

    Args:
        name: the setting that gives the number.
        width: the number.
        dtype: the dtype of the weights.

    Raises:
        UserError: they are not.
    """
    least = ROW_BYTES // dtype.itemsize
    if width % least:
        raise UserError(
            f"method.{name}={width} must be a multiple of {least} for a model in {str(dtype).removeprefix('torch.')}, "
            f"because grouped products need rows of multiples of {ROW_BYTES} bytes"
        )


def width_problems(setting: int | None) -> list[str]:
    """List the problems of `width`, as sentences."""
    if setting is None or (setting >= LEAST and setting % LEAST == 0):
        return []
    return [
        f"method.width={setting} must be a multiple of {LEAST}, because grouped products need rows of multiples of 16 "
        "bytes"
    ]


def width_steps(width: int, multiple: int) -> list[int]:
    """Return the widths that an expert can have, from its present one down to one multiple."""
    return [width, *(steps * multiple for steps in reversed(range(1, math.ceil(width / multiple))))]


def narrowest(width: int, multiple: int) -> int:
    """Return the smallest width that an expert can have."""
    return width_steps(width, multiple)[-1]


@dataclass(frozen=True)
class _Step:
    """One step in which a group of experts becomes narrower.

    Args:
        score: the mean score of the channels that it removes.
        group: the group's place.
        number: how many steps of the group come before it.
        channels: how many channels it removes.
        width: the width of the group's experts after it.
    """

    score: float
    group: tuple[int, int]
    number: int
    channels: int
    width: int


def allocate(
    scores: Mapping[int, Tensor], channels: int, multiple: int, allocation: str = "uniform"
) -> dict[int, list[int]]:
    """Return the width of each expert so that at least a number of channels is removed from all experts together.

    Experts that must have equal widths form a group: all experts, those of a layer, or each one alone. A group gets
    narrower step by step, from one multiple to the next, and each of its experts loses its channels with the least
    scores. Of all steps, those with the least mean score of the removed channels are made, until enough is removed. No
    step of a group has a smaller score than the step before it, so this order is always possible.

    Args:
        scores: the score of each channel (E, F), by layer.
        channels: how many channels to remove, of all experts together.
        multiple: widths are multiples of this, apart from those that do not change.
        allocation: "uniform", "layer" or "global"; see `Narrowing`.

    Returns:
        The width of each expert, by layer.
    """
    widths = {layer: [values.shape[1]] * values.shape[0] for layer, values in scores.items()}
    remaining = channels
    for step in sorted(_steps(scores, multiple, allocation), key=lambda step: (step.score, step.group, step.number)):
        if remaining <= 0:
            break
        layer, expert = step.group
        for narrowed in scores if layer < 0 else (layer,):
            places = range(len(widths[narrowed])) if expert < 0 else (expert,)
            for place in places:
                widths[narrowed][place] = min(widths[narrowed][place], step.width)
        remaining -= step.channels
    return widths


def _steps(scores: Mapping[int, Tensor], multiple: int, allocation: str) -> list[_Step]:
    if allocation == "uniform":  # there is only one order, whatever the scores
        sizes = {layer: tuple(values.shape) for layer, values in scores.items()}
        targets = width_steps(max((width for _, width in sizes.values()), default=0), multiple)
        steps = []
        for number, (before, after) in enumerate(pairwise(targets)):
            removed = sum(experts * max(0, min(width, before) - after) for experts, width in sizes.values())
            steps.append(_Step(0.0, (-1, -1), number, removed, after))
        return steps
    steps = []
    for layer, scores_EF in scores.items():
        num_experts, width = scores_EF.shape
        targets = width_steps(width, multiple)
        sums_EF = scores_EF.double().sort(dim=1).values.cumsum(dim=1)
        if len(targets) == 1:
            continue
        removed_EK = torch.stack([sums_EF[:, width - target - 1] for target in targets[1:]], dim=1)
        sums_EK = removed_EK.diff(dim=1, prepend=torch.zeros(num_experts, 1, dtype=torch.float64))
        per_group = sums_EK.sum(dim=0, keepdim=True) if allocation == "layer" else sums_EK
        size = num_experts if allocation == "layer" else 1
        for group, row in enumerate(per_group.tolist()):
            place = (layer, -1 if allocation == "layer" else group)
            for number, (before, after, total) in enumerate(zip(targets, targets[1:], row, strict=False)):
                removed = size * (before - after)
                steps.append(_Step(total / removed, place, number, removed, after))
    return steps


def retained_channels(scores_EF: Tensor, widths: list[int]) -> list[list[int]]:
    """Return the channels of each expert with the largest scores, ascending; among equals, the last ones."""
    assert all(0 < width <= scores_EF.shape[1] for width in widths), widths
    order_EF = scores_EF.sort(dim=1, stable=True).indices
    return [sorted(order_F[len(order_F) - width :].tolist()) for order_F, width in zip(order_EF, widths, strict=True)]
