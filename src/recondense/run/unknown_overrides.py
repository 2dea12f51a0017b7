"""Composition of a run's config, with explanations for overrides that Hydra cannot apply."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recondense.config.problems import Problem, nearest, suggestion
from recondense.run.default_budget import check_budgets, keep_used
from recondense.run.family_choice import family_override
from recondense.run.search_path import CONFIGS

COMPOSE_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    ValueError,
    yaml.YAMLError,
)  # errors that Hydra raises for overrides


def compose_run(
    name: str, overrides: list[str], loader: ConfigLoader, problems: list[Problem]
) -> dict[str, Any] | None:
    """Return the composed values of one run, as plain containers; None if they cannot be composed.

    Args:
        name: name of the primary config.
        overrides: overrides of the run. Those that cannot be applied or resolved are left out.
        loader: Hydra's loader of configs.
        problems: list to which problems are appended.
    """
    config, by_path = place_with_family(name, overrides, loader, problems)
    if config is None:
        return None
    as_written = cast(dict[str, Any], OmegaConf.to_container(config))
    for key in sorted(_missing(as_written)):
        group, _, leaf = key.rpartition(".")
        choice = f" ({group}={as_written[group].get('name')})" if group in list_groups(loader) else ""
        problems.append(Problem(key, f"must be set{choice}; see the comment on `{leaf}: ???` in conf/."))
        OmegaConf.update(config, key, None)
    values = resolve_values(config, problems)
    if values is not None:
        problems += check_budgets(config, _method_names(loader))
        keep_used(config, values, by_path=bool(by_path))
    return values


def place_with_family(
    name: str, overrides: list[str], loader: ConfigLoader, problems: list[Problem]
) -> tuple[DictConfig | None, list[str]]:
    """Return the same as `place`, with the choice of `model=` that `family_override` makes, and that override."""
    placed: list[Problem] = []
    config = place(name, overrides, loader, placed)
    choice = family_override(config, overrides)
    if choice:
        placed.clear()
        config = place(name, [*overrides, *choice], loader, placed)
    problems += placed
    return config, choice


def place(name: str, overrides: list[str], loader: ConfigLoader, problems: list[Problem]) -> DictConfig | None:
    """Return the composed config. Overrides that cannot be applied become problems and are left out."""
    try:
        return compose(name, overrides)
    except COMPOSE_ERRORS:
        try:
            compose(name, [])
        except COMPOSE_ERRORS as error:
            problems.append(Problem("--config-name", _reason(error), name))
            return None
        return _compose_stepwise(name, overrides, loader, problems)


def _missing(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the dotted names of the settings that are `???`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _missing(value, f"{path}{key}.")
        elif value == "???":
            yield f"{path}{key}"


def resolve_values(config: DictConfig, problems: list[Problem]) -> dict[str, Any] | None:
    """Return the values with their interpolations resolved. One that cannot be resolved becomes a problem, and null."""
    written = config.copy()
    while True:
        try:
            return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
        except OmegaConfBaseException as error:
            key, reason = str(error.full_key or ""), _reason(error)
            reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", reason).strip('"').rstrip(".")
            text = f"cannot be resolved: {reason}.{_remedy(reason)}"
            if not key or key in [problem.setting for problem in problems]:
                problems.append(Problem(key, text if key else f"the config {text}"))
                return None
            problems.append(Problem(key, text, _written(written, key)))
            OmegaConf.update(config, key, None)


def _remedy(reason: str) -> str:
    """Return a remedy for an interpolation that was meant as a variable of the environment; empty for others."""
    if missing := re.search(r"Environment variable '(\w+)' not found", reason):
        return f" Set the variable, or write ${{oc.env:{missing[1]},DEFAULT}}."
    name = re.search(r"Interpolation key '(\w+)' not found", reason)
    if name and (name[1] in os.environ or name[1].isupper()):
        return f" For a variable of the environment, write ${{oc.env:{name[1]}}}."
    return ""


def _written(config: DictConfig, key: str) -> Any:
    """Return a setting's value without resolving it."""
    value: Any = OmegaConf.to_container(config)
    for part in re.findall(r"[^.\[\]]+", key):
        value = value[int(part) if isinstance(value, list) else part]
    return value


def _compose_stepwise(name: str, overrides: list[str], loader: ConfigLoader, problems: list[Problem]) -> DictConfig:
    config, accepted = compose(name, []), list[str]()
    groups = set(list_groups(loader))
    for text in sorted(overrides, key=lambda text: text.partition("=")[0].lstrip("+~") not in groups):
        try:
            config = compose(name, [*accepted, text])
            accepted.append(text)
        except COMPOSE_ERRORS as error:
            problem, instead = _explain(text, config, loader, error)
            problems.append(problem)
            if instead is not None:
                accepted.append(instead)
                config = compose(name, accepted)
    return config


def _explain(text: str, config: DictConfig, loader: ConfigLoader, error: Exception) -> tuple[Problem, str | None]:
    """Return why an override cannot be applied, and the override that was probably meant."""
    override = OverridesParser.create().parse_override(text)
    key = override.key_or_group
    if key in (*list_groups(loader), *(f"hydra/{group}" for group in loader.list_groups("hydra"))):
        options = list_choices(key, loader)
        word = text.partition("=")[2]
        if word not in options:
            near = nearest(word, options)
            return Problem(text, f"there is no such {key}. {suggestion(word, options)}"), near and f"{key}={near}"
        if override.is_add() and not override.is_force_add():
            return Problem(text, f"+ adds a group, and {key} is there already. Write {text[1:]}."), text[1:]
    elif not _has(config, key):
        return Problem(key, f"there is no such setting. {_suggest_key(key, config, loader)}"), None
    elif override.is_add() and not override.is_force_add():
        return Problem(text, f"+ adds a setting, and {key} is there already. Write {text[1:]}."), text[1:]
    return Problem(text, _reason(error.__cause__ or error)), None


def _has(config: DictConfig, key: str) -> bool:
    """Return whether there is a setting of that name whose value is not null, resolved or not."""
    try:
        return OmegaConf.select(config, key, default=None) is not None
    except OmegaConfBaseException:  # an interpolation that cannot be resolved
        return True


def _reason(error: BaseException) -> str:
    """Return an error's first line; for an error in a YAML file all lines, because the last one has the position."""
    lines = str(error).splitlines()
    return " ".join(" ".join(lines if isinstance(error, yaml.YAMLError) else lines[:1]).split())


def _suggest_key(key: str, config: DictConfig, loader: ConfigLoader) -> str:
    """Return a suggestion for an unknown setting: the same name in another section, or a similar name in its own."""
    parent, _, leaf = key.rpartition(".")
    names = list(_names(config))
    elsewhere = [name for name in names if name.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"Did you mean {' or '.join(elsewhere[:3])}?"
    beside = OmegaConf.select(config, parent) if parent and _has(config, parent) else None if parent else config
    if isinstance(beside, DictConfig):
        choices = {str(name) for name in beside} | (set() if parent else set(list_groups(loader)))
        return suggestion(leaf, choices, prefix=parent and f"{parent}.")
    near = nearest(key, [*names, *list_groups(loader)])
    return f"Did you mean {near}?" if near else f"Groups: {', '.join(list_groups(loader))}."


def _names(config: DictConfig, path: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings."""
    for key in map(str, config):
        node = None if OmegaConf.is_interpolation(config, key) or OmegaConf.is_missing(config, key) else config[key]
        if isinstance(node, DictConfig):
            yield from _names(node, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def list_choices(group: str, loader: ConfigLoader) -> list[str]:
    """Return a group's choices, as folder/name for files in subfolders; files that start with _ are not choices."""
    names = [name for name in loader.get_group_options(group, ObjectType.CONFIG) if not name.startswith("_")]
    return names + [
        f"{folder}/{name}" for folder in loader.list_groups(group) for name in list_choices(f"{group}/{folder}", loader)
    ]


def _method_names(loader: ConfigLoader) -> set[str]:
    """Return the choices of the methods, and the names that their files give them."""
    names = set(list_choices("method", loader))
    for source in loader.get_sources():
        if source.scheme() != "file" or Path(source.path).resolve() == CONFIGS:  # our names are those of the choices
            continue
        for choice in sorted(names):
            with suppress(*COMPOSE_ERRORS):  # it is reported if it is used
                if source.is_config(f"method/{choice}"):
                    names.add(
                        str(OmegaConf.select(source.load_config(f"method/{choice}").config, "name", default=choice))
                    )
    return names


def list_groups(loader: ConfigLoader) -> list[str]:
    return [group for group in loader.list_groups("") if group != "hydra"]
