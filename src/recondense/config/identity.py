"""The settings that a result depends on: all but those that are marked."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

NO_RESULT = {"identity": False}  # metadata of a setting that cannot change a result: it has no part in a run's hash


def identity_of(value: Any) -> Any:
    """Settings without those that cannot change a result."""
    if not is_dataclass(value):
        return list(map(identity_of, value)) if isinstance(value, tuple) else value
    names = [entry.name for entry in fields(value) if entry.metadata.get("identity", True)]
    return {name: identity_of(getattr(value, name)) for name in names}
