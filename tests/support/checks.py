"""The messages of all checks of a config, as a command would print them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recondense.config.checks import check_config
from recondense.config.problems import render
from recondense.config.schema import Config
from recondense.config.stages import resolve_stages
from recondense.run.checks_without_torch import check_quickly
from recondense.run.model_and_machine_checks import preflight
from recondense.run.resolved_run import Run


def config_messages(config: Config) -> list[str]:
    """The problems that the config alone shows."""
    stages, problems = resolve_stages(config)
    return render([*problems, *check_config(config, stages)])


def run_messages(config: Config, steps: Sequence[Any] = ()) -> list[str]:
    """The problems that are reported before a run loads weights."""
    stages, problems = resolve_stages(config)
    run = Run(config, stages, steps)
    return render([*problems, *check_quickly(run)] or preflight(run))
