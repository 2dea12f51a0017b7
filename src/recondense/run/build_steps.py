"""Creation of a method's steps from its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def check_steps(method: Mapping[str, Any], steps: Sequence[Any]) -> list[Problem]:
    """Return the problems of objects that are not steps, because they lack what `recondense.methods.step.Step` has.

    Args:
        method: the settings from which the steps were made.
        steps: the steps, in order.
    """
    from recondense.methods.step import Step  # late: it imports torch

    members = [name for name in vars(Step) if not name.startswith("_")]
    problems = []
    for index, step in enumerate(steps):
        missing = [name for name in members if not hasattr(step, name)]
        if missing:
            where = "method._target_" if method.get("steps") is None else f"method.steps[{index}]"
            text = f"is not a step of a method: it has no {', '.join(missing)}; see recondense.methods.step.Step."
            problems.append(Problem(where, text, f"{type(step).__module__}.{type(step).__qualname__}"))
    return problems
