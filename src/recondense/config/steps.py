"""From a method's settings to those of its steps; conf/method/cdmoe.yaml has one step, conf/method/moei2.yaml two."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from recondense.config.reader import read_fields, suggestion

OF_THE_METHOD = ("name", "_target_", "steps", "refit")  # settings that no step takes


def step_entries(method: Mapping[str, Any]) -> list[Any]:
    """What stands for each step: the entries of `steps`, or else the `_target_` beside the method's settings."""
    steps = method.get("steps")
    if steps is None:
        return [method["_target_"]] if "_target_" in method else []
    return list(steps) if isinstance(steps, list | tuple) else []


def step_arguments(method: Mapping[str, Any], problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """What the method's steps are made from, each with the name of its place in the config.

    The name of a class takes those of the method's settings that the class has. A mapping with `_target_` has settings
    of its own.

    Args:
        method: what stands in conf/method/*.yaml, resolved.
        problems: what is wrong goes here, and the step is left out.
    """
    entries = step_entries(method)
    settings = {name: value for name, value in method.items() if name not in OF_THE_METHOD}
    problems += _unknown_settings(settings, entries)
    steps = []
    for index, entry in enumerate(entries):
        where = "method._target_" if method.get("steps") is None else f"method.steps[{index}]"
        if isinstance(entry, str):
            taken = {argument: name for argument, name in _settings_of(entry).items() if name in settings}
            arguments = {"_target_": entry, **{argument: settings[name] for argument, name in taken.items()}}
            names = {argument: f"method.{name}" for argument, name in taken.items()}
        elif isinstance(entry, Mapping) and isinstance(entry.get("_target_"), str):
            arguments, names = dict(entry), {argument: f"{where}.{argument}" for argument in entry}
        else:
            problems.append(
                f"{where}={entry}: expected a class's name, or settings with a _target_; see conf/method/moei2.yaml."
            )
            continue
        if wrong := _wrong_types(arguments, names):
            problems += wrong
        else:
            steps.append((where, arguments))
    return steps


def _unknown_settings(settings: Mapping[str, Any], entries: Sequence[Any]) -> list[str]:
    """Settings that no step has, where all steps take theirs from the method."""
    if not entries or not all(isinstance(entry, str) and _class(entry) for entry in entries):
        return []
    known = {name for entry in entries for name in _settings_of(entry).values()}
    return [
        f"method.{name}: there is no such setting. {suggestion(name, known, prefix='method.')}"
        for name in settings
        if name not in known
    ]


def _class(path: str) -> Any:
    """The class of a dotted name; None where there is none, which instantiating reports."""
    module, _, leaf = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), leaf, None)
    except Exception:  # whatever a module raises
        return None


def _settings_of(path: str) -> dict[str, str]:
    """The arguments of a step's class, each with the name of its setting."""
    target = _class(path)
    settings = {field.name: field.metadata.get("setting") for field in fields(target)} if is_dataclass(target) else {}
    try:
        return {name: settings.get(name) or name for name in inspect.signature(target).parameters}
    except (TypeError, ValueError):  # no class, or one of C that does not say
        return {}


def _wrong_types(arguments: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Values that the fields of a step cannot hold: instantiating would not notice.

    Args:
        names: what the config calls the arguments, for the messages.
    """
    target = _class(arguments["_target_"])
    if not isinstance(target, type) or not is_dataclass(target):
        return []
    values = {key: value for key, value in arguments.items() if not key.startswith("_")}
    values = {key: value for key, value in values.items() if not (isinstance(value, Mapping) and "_target_" in value)}
    problems: list[str] = []
    try:
        read_fields(target, values, names.__getitem__, problems)
    except (NameError, TypeError, AttributeError):  # somebody's annotations that only a type checker can resolve
        return []
    return problems
