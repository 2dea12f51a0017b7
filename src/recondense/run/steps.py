"""The steps of a method as Python code gives them: as objects, or by the name of the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from hydra import compose
from omegaconf import OmegaConf, flag_override
from transformers import PretrainedConfig

from recondense.config.problems import suggestion
from recondense.errors import UserError
from recondense.methods.step import Step
from recondense.run.build_steps import build_steps
from recondense.run.default_budget import has_shape, used_settings
from recondense.run.family_choice import choice_of
from recondense.run.reachable_budget import fitted
from recondense.run.search_path import CONFIGS, compose_from_package


def as_steps(steps: Step | Sequence[Step] | str, config: PretrainedConfig) -> list[Step]:
    """Return a list of steps.

    Args:
        steps: one step, several, or the name of a method in conf/method, whose default settings for the model are used.
        config: config of the model.

    Raises:
        UserError: there is no such method, or no step at all.
    """
    if isinstance(steps, str):
        return build_steps(_method_settings(steps, config))
    listed = list(cast(Sequence[Step], steps)) if isinstance(steps, Sequence) else [steps]
    if not listed:
        raise UserError("there is no step to search; name a method, or give one of its steps")
    return listed


def _method_settings(name: str, planned: PretrainedConfig) -> Mapping[str, Any]:
    """Return the settings of a method in conf/method, with the default budget of a model that it can reach."""
    names = [path.stem for path in (CONFIGS / "method").glob("[!_]*.yaml") if path.stem != "none"]
    if name not in names:
        raise UserError(f"method={name}: there is no such method. {suggestion(name, names, most=len(names))}")
    values = planned.to_dict()
    with compose_from_package():
        config = compose("train", [f"method={name}"])
        if not has_shape(config, values):  # not the embedded model
            config = compose("train", [f"method={name}", f"model={choice_of(values)}"])
    of_shape = has_shape(config, values)
    if not of_shape:
        with flag_override(config, "struct", False):
            config.model.budgets.methods = {}
    method = cast(dict[str, Any], OmegaConf.to_container(config.method, resolve=True))
    return method if of_shape else fitted(method, used_settings(config, method), planned)
