"""From a method's settings to those of its steps; conf/method/cdmoe.yaml has one step, conf/method/moei2.yaml two."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from recondense.config.problems import Problem, suggestion
from recondense.config.validation import type_problems

OF_THE_METHOD = ("name", "_target_", "steps", "refit")  # settings that no step takes


def step_entries(method: Mapping[str, Any]) -> list[Any]:
    """The entries of `steps`, or else the `_target_` beside the method's settings."""
    steps = method.get("steps")
    if steps is None:
        return [method["_target_"]] if "_target_" in method else []
    return list(steps) if isinstance(steps, list | tuple) else []


def step_arguments(method: Mapping[str, Any], problems: list[Problem]) -> list[tuple[str, dict[str, Any]]]:
    """The arguments that the method's steps are made from, each with the name of its place in the config.

    The name of a class takes those of the method's settings that the class has. A mapping with `_target_` has settings
    of its own. If the default of a step's field is a dataclass, its settings stand beside the step's.

    Args:
        method: the settings of conf/method/*.yaml, resolved.
        problems: takes the problems of the steps; a step with problems is left out.
    """
    entries = step_entries(method)
    settings = {name: value for name, value in method.items() if name not in OF_THE_METHOD}
    if all(isinstance(entry, str) and _class(entry) for entry in entries):
        problems += _unknown_settings("method", settings, entries)
    steps = []
    for index, entry in enumerate(entries):
        where = "method._target_" if method.get("steps") is None else f"method.steps[{index}]"
        if isinstance(entry, str):
            target, prefix = entry, "method"
            values = {name: settings[name] for name in _settings_of(entry) if name in settings}
            mistakes = []
        elif isinstance(entry, Mapping) and isinstance(entry.get("_target_"), str):
            target, prefix = entry["_target_"], where
            values = {name: value for name, value in entry.items() if name != "_target_"}
            mistakes = _unknown_settings(where, values, [target] if is_dataclass(_class(target)) else [])
        else:
            text = "expected a class's name, or settings with a _target_; see conf/method/moei2.yaml."
            problems.append(Problem(where, text, entry))
            continue
        mistakes += _wrong_types(target, values, prefix)
        problems += mistakes
        if not mistakes:
            steps.append((where, {"_target_": target, **_grouped(target, values)}))
    return steps


def _unknown_settings(prefix: str, settings: Mapping[str, Any], targets: Sequence[str]) -> list[Problem]:
    """The problems of settings that no step has."""
    known = {name for target in targets for name in _settings_of(target)}
    return [
        Problem(f"{prefix}.{name}", f"there is no such setting. {suggestion(name, known, prefix=f'{prefix}.')}")
        for name in settings
        if targets and not name.startswith("_") and name not in known
    ]


def _class(path: str) -> Any:
    """The class of a dotted name; None where there is none, which instantiating reports."""
    module, _, leaf = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), leaf, None)
    except Exception:  # whatever a module raises
        return None


def _settings_of(path: str) -> list[str]:
    """The names of the settings of a step's class."""
    target = _class(path)
    try:
        arguments = inspect.signature(target).parameters
    except (TypeError, ValueError):  # no class, or one of C that does not say
        return []
    parts = _parts(target)
    names = [name for name in arguments if name not in parts]
    return [*names, *(name for part in parts.values() for name in _names(part))]


def _parts(target: Any) -> dict[str, Any]:
    """The fields of a step whose settings stand beside its own, with their defaults."""
    if not is_dataclass(target):
        return {}
    defaults = {field.name: field.default for field in fields(target)}
    return {name: value for name, value in defaults.items() if is_dataclass(value) and not isinstance(value, type)}


def _names(part: Any) -> list[str]:
    return [field.name for field in fields(part) if field.metadata.get("setting", True)]


def _grouped(path: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a step as arguments of its class: those of a part are made into that part."""
    grouped = dict(values)
    for name, default in _parts(_class(path)).items():
        given = {setting: grouped.pop(setting) for setting in _names(default) if setting in grouped}
        if given:
            kind = type(default)
            rest = {field.name: getattr(default, field.name) for field in fields(default)}
            grouped[name] = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **rest, **given}
    return grouped


def _wrong_types(path: str, values: Mapping[str, Any], prefix: str) -> list[Problem]:
    """The problems of values that the fields of a step cannot hold: instantiating would not notice.

    Args:
        prefix: stands before the names of the settings in messages.
    """
    target = _class(path)
    if not isinstance(target, type) or not is_dataclass(target):
        return []
    parts = _parts(target)
    kinds = [(target, [field.name for field in fields(target) if field.name not in parts])]
    kinds += [(type(part), _names(part)) for part in parts.values()]
    problems: list[Problem] = []
    try:
        for kind, names in kinds:
            plain = {name: values[name] for name in names if name in values and not _is_instance(values[name])}
            problems += type_problems(get_type_hints(kind, include_extras=True), plain, f"{prefix}.{{}}".format)
    except (NameError, TypeError, AttributeError):  # somebody's annotations that only a type checker can resolve
        return []
    return problems


def _is_instance(value: Any) -> bool:
    """True for a mapping that is instantiated, which only its class can check."""
    return isinstance(value, Mapping) and "_target_" in value
