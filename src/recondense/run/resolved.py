"""A run as its command says it: composed, read and resolved once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recondense.config.schema import Config, from_dict
from recondense.config.stages import Stages, require_stages
from recondense.run.build_steps import build_steps


@dataclass(frozen=True)
class Run:
    """One run, resolved.

    Args:
        stages: of its recovery, in order.
        steps: of its method, in order.
    """

    config: Config
    stages: Stages
    steps: Sequence[Any] = ()


def resolve(values: Mapping[str, Any]) -> Run:
    """Return a run from the plain containers of its config.

    Raises:
        ConfigError: everything that is wrong with the config alone, or with the method's steps.
    """
    config = from_dict(values)
    return Run(config, require_stages(config), build_steps(config.method))
