"""A run whose settings are composed, validated and resolved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recondense.config.schema import Config
from recondense.config.stages import Stages


@dataclass(frozen=True)
class Run:
    """A resolved run.

    Args:
        config: settings of the run.
        stages: stages of the recovery, in order.
        steps: steps of the method, in order.
        overrides: what the command sets, as it is written.
    """

    config: Config
    stages: Stages
    steps: Sequence[Any] = ()
    overrides: Sequence[str] = ()
