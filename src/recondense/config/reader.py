"""Plain containers to dataclasses: types are checked, and everything wrong is collected instead of raised."""

from __future__ import annotations

import difflib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NAMES = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
LISTS = (tuple, list, Sequence)  # origins of annotations


def suggestion(word: str, choices: Iterable[str], *, prefix: str = "", most: int = 8) -> str:
    """`Did you mean x? Choices: x, y.`: the first where something is near, the second where it helps.

    Args:
        prefix: stands before the name that is suggested.
        most: longer lists of choices are shown only where nothing is near.
    """
    choices = sorted(choices)
    near = nearest(word, choices)
    parts = [] if near is None else [f"Did you mean {prefix}{near}?"]
    if near is None or len(choices) <= most:
        parts.append(f"Choices: {', '.join(choices)}.")
    return " ".join(parts)


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that a misspelt word resembles."""
    return next(iter(difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)), None)


def read_dataclass(kind: type, values: Any, path: str, messages: list[str]) -> Any:
    """An instance of `kind`; what is wrong goes to `messages`, and its default takes its place.

    Args:
        path: dotted name of `values` in the config, for the messages.
    """
    if not isinstance(values, Mapping):
        messages.append(f"{path}={_show(values)}: expected a group of settings.")
        return kind()
    return kind(**read_fields(kind, values, lambda name: f"{path}.{name}" if path else name, messages))


def read_fields(
    kind: Any, values: Mapping[str, Any], name_of: Callable[[str], str], messages: list[str]
) -> dict[str, Any]:
    """Values for fields of the dataclass `kind`, each in its field's type; what is wrong goes to `messages` instead.

    Args:
        name_of: what the config calls a field, for the messages.
    """
    hints = get_type_hints(kind)
    defaults = {entry.name: entry.default for entry in fields(kind)}
    for key in values:
        if key not in defaults:
            where = name_of(str(key))
            hint = suggestion(str(key), defaults, prefix=where.removesuffix(str(key)))
            messages.append(f"{where}: there is no such setting. {hint}")
    found = {}
    for name, default in defaults.items():
        if name in values:
            before = len(messages)
            value = _read_value(hints[name], values[name], name_of(name), messages, default)
            if len(messages) == before or is_dataclass(value):
                found[name] = value
    return found


def _read_value(hint: Any, value: Any, path: str, messages: list[str], default: Any = None) -> Any:
    """The value as `hint` wants it, or a message."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and types.NoneType in options:
        return None
    options = tuple(option for option in options if option is not types.NoneType)
    for option in options:
        if is_dataclass(option):
            return read_dataclass(typing.cast(type, option), value, path, messages)
        fits, result = _convert(option, value, path, messages)
        if fits:
            return result
    choices = get_args(options[0]) if get_origin(options[0]) is Literal else ()
    if choices:
        messages.append(f"{path}={_show(value)}: there is no such choice. {suggestion(str(value), choices)}")
    else:
        messages.append(f"{path}={_show(value)}: {_expectation(options, value, path, default)}")
    return None


def _convert(option: Any, value: Any, path: str, messages: list[str]) -> tuple[bool, Any]:
    """Whether a value is of a type that is no dataclass, and the value in that type."""
    origin = get_origin(option)
    if origin is Literal:
        return value in get_args(option), value
    if origin in LISTS:
        items = get_args(option)
        fixed = len(items) if origin is tuple and items[-1] is not Ellipsis else None
        if isinstance(value, str) or not isinstance(value, Sequence) or fixed not in (None, len(value)):
            return False, None
        kinds = items if fixed else [items[0]] * len(value)
        each = enumerate(zip(kinds, value, strict=True))
        return True, tuple(_read_value(kind, entry, f"{path}[{index}]", messages) for index, (kind, entry) in each)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping), value
    if origin is not None:  # some other container of somebody's
        return True, value
    if option not in NAMES:  # a class of somebody else's
        return True, value
    if isinstance(value, bool):
        return option is bool, value
    if option is float and isinstance(value, int | float):
        finite = abs(value) <= sys.float_info.max
        return finite, float(value) if finite else None
    return isinstance(value, option), value


def _expectation(options: Sequence[Any], value: Any, path: str, default: Any) -> str:
    """What a value should have been, as a sentence; where it was to stand in a list, the list."""
    example = f" such as {default}" if len(options) > 1 and isinstance(default, str) else ""
    names = [_describe(option) + (example if option is str else "") for option in options]
    words = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    messages: list[str] = []
    listed = any(_convert(option, [value], path, messages)[0] for option in options if get_origin(option) in LISTS)
    return f"expected {words}." + (f" Write {path}=[{_show(value)}]." if listed and not messages else "")


def _describe(option: Any) -> str:
    if get_origin(option) in LISTS:
        items = get_args(option)
        fixed = get_origin(option) is tuple and items[-1] is not Ellipsis
        return f"a list{f' of {len(items)}' if fixed else ''} (each {_describe(items[0])})"
    return NAMES.get(option, "a group of settings")


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
