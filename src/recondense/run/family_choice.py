"""The choice of `model=` for a command that only says where its model is: that of the model's family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recondense.config.schema import GENERAL
from recondense.models.config_json import config_values, model_type, same_sizes
from recondense.models.published_configs import recorded_ids, recorded_values
from recondense.run.done_runs import family_of_done
from recondense.run.search_path import CONFIGS


def family_override(config: DictConfig | None, overrides: Sequence[str]) -> list[str]:
    """Return the override of `model` for a run whose path would only replace that of the embedded model.

    The embedded model's settings are for a model that is trained within minutes. They stay if the command line chooses
    that model.

    Args:
        config: the composed config of the run; None if it cannot be composed.
        overrides: the run's overrides, from which it was composed.

    Returns:
        `["model=..."]`, or nothing if the run's choice of a model stays.
    """
    if config is None or _chooses_model(overrides):
        return []
    try:
        model: Any = OmegaConf.to_container(config.model, resolve=True)
    except (OmegaConfBaseException, ValueError):  # reported where it stands
        return []
    if not isinstance(model, dict):
        return []
    path, revision = model.get("path"), model.get("revision")
    if model.get("pretrain") is None or not isinstance(path, str):
        return []
    values = config_values(path, revision if isinstance(revision, str) else None, hub=config.get("plan_only") is False)
    return [f"model={choice_of(values) if values is not None else _choice_of_done(path, config) or GENERAL}"]


def _choice_of_done(path: str, config: DictConfig) -> str | None:
    """Return the choice that a model decided for a run that is done, if it cannot be read any more."""
    try:
        output_dir, name, run_dir = (config.get(key) for key in ("output_dir", "experiment_name", "run_dir"))
    except OmegaConfBaseException:  # reported where it stands
        return None
    if not isinstance(output_dir, str) or not isinstance(name, str) or not isinstance(run_dir, str | None):
        return None
    return family_of_done(path, Path(output_dir).expanduser() / name, run_dir)


def _chooses_model(overrides: Sequence[str]) -> bool:
    parser = OverridesParser.create()
    return any(text.startswith("model=") or parser.parse_override(text).key_or_group == "model" for text in overrides)


def choice_of(values: Mapping[str, Any]) -> str:
    """Return the choice of `model=` for the values of a config.json.

    It is the one whose checkpoint has the same sizes, otherwise the one of the same model_type. If several have this
    model_type, it is the one of that name.
    """
    name = model_type(values)
    candidates = {choice: recorded for choice, recorded in _published().items() if model_type(recorded) == name}
    exact = [choice for choice, recorded in candidates.items() if same_sizes(values, recorded)]
    return next(iter([*exact, *(choice for choice in candidates if choice == name), *candidates, GENERAL]))


@cache
def _published() -> dict[str, dict[str, Any]]:
    """Return the config.json of the checkpoint of each file in conf/model, by the file's name."""
    paths = {
        file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["path"]
        for file in sorted((CONFIGS / "model").glob("[!_]*.yaml"))
    }
    known = recorded_ids()
    return {choice: recorded_values(path) for choice, path in paths.items() if path in known}
