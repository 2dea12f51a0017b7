"""Plain containers to dataclasses: types are checked, and everything wrong is collected instead of raised."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


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
    hints = get_type_hints(kind)
    names = [entry.name for entry in fields(kind)]
    for key in values:
        if key not in names:
            prefix = f"{path}." if path else ""
            messages.append(f"{prefix}{key}: there is no such setting. {suggestion(str(key), names, prefix=prefix)}")
    found = {}
    for name in names:
        if name in values:
            before = len(messages)
            value = _read_value(hints[name], values[name], f"{path}.{name}" if path else name, messages)
            if len(messages) == before or is_dataclass(value):
                found[name] = value
    return kind(**found)


def _read_value(hint: Any, value: Any, path: str, messages: list[str]) -> Any:
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
        messages.append(f"{path}={_show(value)}: expected {' or '.join(_describe(option) for option in options)}.")
    return None


def _convert(option: Any, value: Any, path: str, messages: list[str]) -> tuple[bool, Any]:
    """Whether a value is of a type that is no dataclass, and the value in that type."""
    origin = get_origin(option)
    if origin is Literal:
        return value in get_args(option), value
    if origin is tuple:
        items = get_args(option)
        fixed = len(items) if items[-1] is not Ellipsis else None
        if isinstance(value, str) or not isinstance(value, Sequence) or fixed not in (None, len(value)):
            return False, None
        item = items[0]
        return True, tuple(_read_value(item, entry, f"{path}[{index}]", messages) for index, entry in enumerate(value))
    if origin is not None:  # a free mapping
        return isinstance(value, Mapping), value
    if option is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    return isinstance(value, option) and (option is bool or not isinstance(value, bool)), value


def _describe(option: Any) -> str:
    if get_origin(option) is tuple:
        items = get_args(option)
        count = "" if items[-1] is Ellipsis else f" of {len(items)}"
        return f"a list{count} (each {_describe(items[0])})"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return names.get(option, "a group of settings")


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
