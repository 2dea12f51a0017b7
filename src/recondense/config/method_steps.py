"""Resolve a method's settings into those of its steps; conf/method/cdmoe.yaml has one step, moei2.yaml two."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from recondense.config.problems import Problem, suggestion
from recondense.config.validation import type_problems

OF_THE_METHOD = ("name", "_target_", "steps", "refit", "protect_super_experts", "rounds")  # settings that no step takes


def method_identity(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a method by which its runs and plans differ. One round is the same as no such setting."""
    return {name: value for name, value in method.items() if (name, value) != ("rounds", 1)}


def step_entries(method: Mapping[str, Any]) -> list[Any]:
    """Return the entries of `steps`, or the method's `_target_` as the only entry."""
    steps = method.get("steps")
    if steps is None:
        return [method["_target_"]] if "_target_" in method else []
    return list(steps) if isinstance(steps, list | tuple) else []


def step_arguments(method: Mapping[str, Any], problems: list[Problem]) -> list[tuple[str, dict[str, Any]]]:
    """Return the arguments of the method's steps, each with the dotted name of the step in the config.

    A step given by the name of a class takes the settings of the method that the class has. A step given as a mapping
    with `_target_` has its own settings. If the default of a step's field is a dataclass, the fields of that dataclass
    are settings on the same level as the step's other settings.

    Args:
        method: the resolved settings of conf/method/*.yaml.
        problems: the problems of the steps are appended to it; a step with problems is not returned.
    """
    entries = step_entries(method)
    settings = {name: value for name, value in method.items() if name not in OF_THE_METHOD}
    if all(isinstance(entry, str) and isinstance(_class(entry), type) for entry in entries):
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
        mistakes += _wrong_target(where, target) or _wrong_types(target, values, prefix)
        problems += mistakes
        if not mistakes:
            steps.append((where, {"_target_": target, **_grouped(target, values)}))
    return steps


def _wrong_target(where: str, target: str) -> list[Problem]:
    """Return the problem of a name that is not that of a class, if its module can be imported."""
    module, _, leaf = target.rpartition(".")
    member = _class(target)
    if member is not None:
        text = "is not a class. Name the class of a step, such as recondense.methods.cdmoe.CDMoE."
        return [] if isinstance(member, type) else [Problem(where, text, target)]
    names = vars(sys.modules[module]) if module in sys.modules else {}
    classes = [name for name, value in names.items() if _is_public(module, value)]
    if not classes:  # Hydra says why nothing can be imported
        return []
    return [Problem(where, f"{module} has no such class. {suggestion(leaf, classes, prefix=f'{module}.')}", target)]


def _is_public(module: str, value: Any) -> bool:
    """Return whether a value is a class of a module that other modules may use."""
    return isinstance(value, type) and value.__module__ == module and not value.__name__.startswith("_")


def _unknown_settings(prefix: str, settings: Mapping[str, Any], targets: Sequence[str]) -> list[Problem]:
    """Return the problems of settings that no step has.

    Args:
        prefix: the dotted name of `settings` in the config.
        settings: the settings by name.
        targets: the class names of the steps that can have the settings; nothing is checked without any.
    """
    known = {name for target in targets for name in _settings_of(target)}
    choices = {*known, "refit", "protect_super_experts", "rounds"} if known and prefix == "method" else known
    problems = []
    for name in settings:
        if targets and not name.startswith("_") and name not in known:
            hint = suggestion(name, choices, prefix=f"{prefix}.")
            problems.append(Problem(f"{prefix}.{name}", f"there is no such setting. {hint}".rstrip()))
    return problems


def _class(path: str) -> Any:
    """Return the class of a dotted name; None if there is none, which is reported when the step is instantiated."""
    module, _, leaf = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), leaf, None)
    except Exception:  # whatever a module raises
        return None


def _settings_of(path: str) -> list[str]:
    """Return the names of the settings of a step's class."""
    target = _class(path)
    try:
        arguments = inspect.signature(target).parameters
    except (TypeError, ValueError):  # not a class, or a C class without a signature
        return []
    parts = _parts(target)
    names = [name for name in arguments if name not in parts]
    return [*names, *(name for part in parts.values() for name in _names(part))]


def _parts(target: Any) -> dict[str, Any]:
    """Return the defaults of those fields of a step that are dataclasses, by name."""
    if not is_dataclass(target):
        return {}
    defaults = {field.name: field.default for field in fields(target)}
    return {name: value for name, value in defaults.items() if is_dataclass(value) and not isinstance(value, type)}


def _names(part: Any) -> list[str]:
    return [field.name for field in fields(part) if field.metadata.get("setting", True)]


def _grouped(path: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a step as arguments of its class; settings of a nested dataclass become that dataclass."""
    grouped = dict(values)
    for name, default in _parts(_class(path)).items():
        changes = {setting: grouped.pop(setting) for setting in _names(default) if setting in grouped}
        if changes:
            kind = type(default)
            defaults = {field.name: getattr(default, field.name) for field in fields(default)}
            grouped[name] = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **defaults, **changes}
    return grouped


def _wrong_types(path: str, values: Mapping[str, Any], prefix: str) -> list[Problem]:
    """Return the problems of values whose types do not match a step's annotations; a dataclass does not check them.

    Args:
        path: the dotted name of the step's class.
        values: the settings of the step by name.
        prefix: the dotted name of `values` in the config.
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
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can resolve
        return []
    return problems


def _is_instance(value: Any) -> bool:
    """Return whether a value is a mapping that Hydra instantiates; only its class can check it."""
    return isinstance(value, Mapping) and "_target_" in value
