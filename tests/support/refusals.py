"""Checks of commands that are refused."""

from __future__ import annotations

from collections.abc import Iterable


def assert_refused(code: int, err: str, parts: Iterable[str]) -> None:
    """A refused command has exit code 2, no traceback, and a message with these parts."""
    assert code == 2, err
    assert "Traceback" not in err
    assert "recondense: " in err
    for part in parts:
        assert part in err, err


def without_recovery(arguments: Iterable[str]) -> list[str]:
    """The arguments of a command, with recovery=none unless they name a recovery."""
    words = list(arguments)
    named = any(word.startswith("recovery=") for word in words)
    return [*words, *(() if named else ("recovery=none",))]
