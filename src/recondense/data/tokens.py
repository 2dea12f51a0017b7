"""The token ids of a run: its calibration set, and the windows of its validation and of its recovery stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from recondense.data.calibration_set import CalibrationSet
from recondense.data.loader import Table


@dataclass(frozen=True)
class StageTokens:
    """The windows of a recovery stage.

    Args:
        train: training windows.
        validation: validation windows; None if the stage does not validate, or has no validation text.
        counts: numbers of records or unpacked texts that were kept, left out and truncated; empty for packed texts.
    """

    train: Table
    validation: Table | None
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Tokens:
    """All token ids of a run. Equal texts and lengths share a tensor.

    Args:
        calibration: the calibration set; None if the run needs none.
        validation: validation windows (N, S), int64, for the perplexity; None without it, or without validation text.
        stages: the windows of each recovery stage, by the stage's name; the control trains on the same ones.
        sha256: the SHA-256 of the texts of each split, from `Texts.sha256`.
    """

    calibration: CalibrationSet | None
    validation: Tensor | None
    stages: Mapping[str, StageTokens]
    sha256: Mapping[str, str]
