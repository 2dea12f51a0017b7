"""Creation of a method's steps from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from recondense.config.method_steps import step_arguments
from recondense.config.problems import Problem, render
from recondense.errors import ConfigError, UserError


def build_steps(method: Mapping[str, Any]) -> list[Any]:
    """Return the method's steps, in order.

    Args:
        method: settings of the method, as in conf/method.

    Raises:
        ConfigError: a class does not exist, no step has a given setting, or a value has the wrong type or is refused by
            its step. The error lists all problems.
    """
    problems: list[Problem] = []
    steps = []
    for where, arguments in step_arguments(method, problems):
        try:
            steps.append(instantiate(arguments, _convert_="all"))
        except InstantiationException as error:
            if isinstance(error.__cause__, UserError):
                problems += [Problem("", text) for text in str(error.__cause__).splitlines()]
            else:
                text = " ".join(str(error.__cause__ or error).split())
                problems.append(Problem(where, text, arguments["_target_"]))
    if problems:
        raise ConfigError(render(problems))
    return steps
