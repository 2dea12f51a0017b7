"""Problems of settings as data: the setting, its value, and the limit and remedy in words."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

NOT_SHOWN = object()  # the value of a problem that has none, or whose text contains it


@dataclass(frozen=True)
class Problem:
    """One problem of a setting.

    Args:
        setting: the dotted name in the config; empty if the text names the setting.
        text: the limit and the remedy.
        value: the value as the user wrote it.
        of_value: whether the setting is known and its value has the right type, so that the rest can still be checked.
    """

    setting: str
    text: str
    value: Any = NOT_SHOWN
    of_value: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        value = "" if self.value is NOT_SHOWN else f"={show(self.value)}"
        return f"{self.setting}{value}: {self.text}" if self.setting else self.text


def render(problems: Iterable[Problem]) -> list[str]:
    """Return the messages of some problems, without duplicates."""
    return list(dict.fromkeys(map(str, problems)))


def show(value: Any) -> str:
    """Return a value as YAML; a string that YAML would read as another type is quoted."""
    if isinstance(value, str):
        return repr(value) if reads_as_other(value) else value
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {show(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(show, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def json_type(value: Any) -> str:
    """Return the name of a value's type in JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = ((str, "a text"), (int | float, "a number"), (Mapping, "an object"), (list | tuple, "a list"))
    return next((name for kind, name in names if isinstance(value, kind)), f"a {type(value).__name__}")


def reads_as_other(text: str) -> bool:
    """Return whether YAML reads an unquoted text as a number, a boolean, null, a list or a mapping."""
    if text.strip().lower() in ("", "null", "true", "false") or text.strip()[:1] in ("[", "{"):
        return True
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def suggestion(word: str, choices: Iterable[str], *, prefix: str = "", most: int = 8) -> str:
    """Return a suggestion such as `Did you mean x? Choices: x, y.`

    The question is left out if no choice is similar to the word; without any choice the text is empty.

    Args:
        word: the word that the user wrote.
        choices: the valid words.
        prefix: is put before the suggested name.
        most: a longer list of choices is shown only if no choice is similar.
    """
    choices = sorted(choices)
    near = nearest(word, choices)
    parts = [] if near is None else [f"Did you mean {prefix}{near}?"]
    if choices and (near is None or len(choices) <= most):
        parts.append(f"Choices: {', '.join(choices)}.")
    return " ".join(parts)


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that is most similar to a misspelt word; None if none is similar enough."""
    return next(iter(difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)), None)
