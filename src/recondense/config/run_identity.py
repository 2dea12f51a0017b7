"""The identity of a run: its settings without those that the schema marks with NO_RESULT."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

NO_RESULT = {"identity": False}  # metadata of a setting that cannot change a result and is not part of a run's hash


def identity_of(value: Any) -> Any:
    """Return settings as plain containers, without those that cannot change a result."""
    if not is_dataclass(value):
        return list(map(identity_of, value)) if isinstance(value, tuple) else value
    names = [entry.name for entry in fields(value) if entry.metadata.get("identity", True)]
    return {name: identity_of(getattr(value, name)) for name in names}
