"""Commands composed as the command line composes them, with the choice of a family and the default budget."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from recondense.config.problems import Problem, render
from recondense.run.search_path import initialize_hydra
from recondense.run.unknown_overrides import compose_run


def composed(*overrides: str, config_dir: str | None = None) -> dict[str, Any]:
    """The values of a run without problems."""
    problems: list[Problem] = []
    arguments = Namespace(config_path=None, config_dir=config_dir, overrides=list(overrides))
    with initialize_hydra("train", arguments) as loader:
        values = compose_run("train", list(overrides), loader, problems)
    assert values is not None and problems == [], render(problems)
    return values
