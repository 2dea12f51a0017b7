"""What was decided, as plain data: a Plan is a list of operations on layers, without tensors.

A Plan fixes choices and shapes; computed weights live in checkpoints and exports. The file needs the standard
library alone, so that any tool can read a plan.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from recondense.operations import OPERATIONS, Condense, Drop, Factorize, Merge, Operation, Prune, Refit

__all__ = ["Condense", "Drop", "Factorize", "Merge", "Operation", "Plan", "Prune", "Refit", "write_aside"]

SCHEMA = 1


@dataclass(frozen=True)
class Plan:
    """The concatenated decisions of a method's steps.

    Args:
        model: what the plan was made for (hub id, folder or name).
        fingerprint: hashes of what decided it: weights, calibration, method.
        operations: in the order in which they were chosen.
        search: what decided it (orders, scores, seconds); JSON values only.
        earlier: what was done to the model before, where it is a compressed folder; layers as they were numbered then.
    """

    model: str
    operations: tuple[Operation, ...] = ()
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    earlier: tuple[Operation, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that some operation changes, ascending."""
        return tuple(sorted({operation.layer for operation in self.operations}))

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "fingerprint": dict(self.fingerprint),
            "operations": _to_json(self.operations),
            "search": dict(self.search),
            **({"earlier": _to_json(self.earlier)} if self.earlier else {}),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from parsed JSON.

        Raises:
            ValueError: another schema version, an unknown kind of operation, or a missing key.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"plan: schema {data.get('schema')!r} is not {SCHEMA}, the version that this code reads")
        return cls(
            model=str(data.get("model", "")),
            operations=_from_json(data.get("operations", ())),
            fingerprint=dict(data.get("fingerprint", {})),
            search=dict(data.get("search", {})),
            earlier=_from_json(data.get("earlier", ())),
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        return cls.from_dict(json.loads(text))

    def save(self, path: Path) -> None:
        write_aside(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _to_json(operations: Sequence[Operation]) -> list[dict[str, Any]]:
    found = [{"kind": operation.kind, **asdict(operation)} for operation in operations]
    return cast(list[dict[str, Any]], json.loads(json.dumps(found)))


def _from_json(entries: Sequence[Mapping[str, Any]]) -> tuple[Operation, ...]:
    operations = []
    for entry in entries:
        kind = entry.get("kind")
        if kind not in OPERATIONS:
            raise ValueError(f"plan: unknown kind of operation {kind!r}; known: {', '.join(OPERATIONS)}")
        try:
            operations.append(OPERATIONS[kind].from_dict(entry))
        except KeyError as missing:
            raise ValueError(f"plan: a {kind} operation lacks {missing}") from None
    return tuple(operations)


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a file under another name, then rename it: a kill leaves the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
