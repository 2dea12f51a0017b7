"""The identity of a run: its settings without those that the schema marks with NO_RESULT."""

from __future__ import annotations

from dataclasses import Field, fields, is_dataclass
from typing import Any

NO_RESULT = {"identity": False}  # metadata of a setting that cannot change a result and is not part of a run's hash
LATER = {"identity": "changed"}  # of a setting that earlier versions do not have: part of the hash only if changed


def identity_of(value: Any) -> Any:
    """Return settings as plain containers, without those that cannot change a result."""
    if not is_dataclass(value):
        return list(map(identity_of, value)) if isinstance(value, tuple) else value
    return {entry.name: identity_of(getattr(value, entry.name)) for entry in fields(value) if _counts(entry, value)}


def _counts(entry: Field[Any], value: Any) -> bool:
    identity = entry.metadata.get("identity", True)
    return getattr(value, entry.name) != entry.default if identity == LATER["identity"] else identity
