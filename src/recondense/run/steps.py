"""The steps of a method, made from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from recondense.config.steps import step_arguments
from recondense.errors import ConfigError, UserError


def build_steps(method: Mapping[str, Any]) -> list[Any]:
    """The method's steps, in order.

    Raises:
        ConfigError: classes that do not exist, settings that no step has, values of a wrong type, and values that a
            step refuses.
    """
    steps, problems = [], list[str]()
    for where, arguments in step_arguments(method, problems):
        try:
            steps.append(instantiate(arguments, _convert_="all"))
        except InstantiationException as error:
            if isinstance(error.__cause__, UserError):
                problems += str(error.__cause__).splitlines()
            else:
                text = " ".join(str(error.__cause__ or error).split())
                problems.append(f"{where}={arguments['_target_']}: {text}")
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return steps
