"""What is wrong with a setting, as data: the setting, its value, and one sentence with the limit and the remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NOT_SHOWN = object()  # the value of a problem whose text says it, or that has none


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        setting: dotted name in the config; empty if the text names it.
        text: the limit and the remedy.
        value: as the user wrote it.
    """

    setting: str
    text: str
    value: Any = NOT_SHOWN

    def __str__(self) -> str:
        value = "" if self.value is NOT_SHOWN else f"={show(self.value)}"
        return f"{self.setting}{value}: {self.text}" if self.setting else self.text


def render(problems: Iterable[Problem]) -> list[str]:
    """The messages of some problems, each once."""
    return list(dict.fromkeys(map(str, problems)))


def show(value: Any) -> str:
    """A value as YAML has it; a text that YAML would read as something else is shown in quotes."""
    if isinstance(value, str):
        return repr(value) if reads_as_other(value) else value
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {show(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(show, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def reads_as_other(text: str) -> bool:
    """Whether YAML reads a text, unless it is quoted, as a number, a truth value or null."""
    if text.strip().lower() in ("", "null", "true", "false"):
        return True
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


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
