"""The steps of a method as Python code gives them: as objects, or by the name of the method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from hydra import compose
from omegaconf import OmegaConf

from recondense.config.problems import suggestion
from recondense.errors import UserError
from recondense.methods.step import Step
from recondense.run.build_steps import build_steps
from recondense.run.search_path import CONFIGS, compose_from_package


def as_steps(steps: Step | Sequence[Step] | str) -> list[Step]:
    """Return a list of steps.

    Args:
        steps: one step, several, or the name of a method in conf/method, whose default settings are used.

    Raises:
        UserError: there is no such method, or no step at all.
    """
    if isinstance(steps, str):
        return build_steps(_method_settings(steps))
    listed = list(cast(Sequence[Step], steps)) if isinstance(steps, Sequence) else [steps]
    if not listed:
        raise UserError("there is no step to search; name a method, or give one of its steps")
    return listed


def _method_settings(name: str) -> dict[str, Any]:
    """Return the settings of a method in conf/method."""
    names = [path.stem for path in (CONFIGS / "method").glob("[!_]*.yaml") if path.stem != "none"]
    if name not in names:
        raise UserError(f"method={name}: there is no such method. {suggestion(name, names, most=len(names))}")
    with compose_from_package():
        config = compose("train", [f"method={name}"])
    return cast(dict[str, Any], OmegaConf.to_container(config.method, resolve=True))
