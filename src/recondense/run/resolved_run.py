"""A run whose settings are composed, validated and resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recondense.config.schema import Config, from_dict
from recondense.config.stages import Stages, require_stages
from recondense.run.build_steps import build_steps


@dataclass(frozen=True)
class Run:
    """A resolved run.

    Args:
        config: settings of the run.
        stages: stages of the recovery, in order.
        steps: steps of the method, in order.
    """

    config: Config
    stages: Stages
    steps: Sequence[Any] = ()


def resolve(values: Mapping[str, Any]) -> Run:
    """Return a run from the plain containers of its config.

    Raises:
        ConfigError: the config or the method's steps have problems; the error lists all of them.
    """
    config = from_dict(values)
    return Run(config, require_stages(config), build_steps(config.method))
