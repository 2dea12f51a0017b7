"""What was decided, as plain data: a Plan is a list of operations on layers, without tensors.

A Plan fixes choices and shapes; computed weights live in checkpoints and exports. The file needs the standard
library alone, so that any tool can read a plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from recondense.errors import UserError
from recondense.files import write_aside
from recondense.operations import OPERATIONS, Operation

SCHEMA = 1


@dataclass(frozen=True)
class History:
    """What was done to a model in all, one run after the other.

    Args:
        operations: in order; layers are numbered as in the model that nobody had compressed.
        layers: that number for each decoder layer that there is now; empty: as they are counted now.
    """

    operations: tuple[Operation, ...] = ()
    layers: tuple[int, ...] = ()

    def then(self, operations: Sequence[Operation], kept: Sequence[int]) -> History:
        """After one run more.

        Args:
            operations: of that run; layers are numbered as it found them.
            kept: the decoder layers that it found and that the written model has.
        """
        numbered = [replace(operation, layer=self._number(operation.layer)) for operation in operations]
        layers = tuple(map(self._number, kept))
        return History((*self.operations, *numbered), () if layers == tuple(range(len(layers))) else layers)

    def changed(self, num_layers: int) -> tuple[int, ...]:
        """Those of the decoder layers that there are now, as they are counted now, which some operation changed."""
        numbers = {operation.layer for operation in self.operations}
        return tuple(layer for layer in range(num_layers) if self._number(layer) in numbers)

    @classmethod
    def of_folder(cls, path: str | Path | None) -> History:
        """What the plan in a model's folder says; nothing of a folder that has none."""
        try:
            plan = Plan.load(Path(path, "plan.json")) if path else Plan("")
            return plan.history if plan.history.operations else cls(plan.operations)
        except (OSError, ValueError, AttributeError, TypeError):  # somebody else's file of that name
            return cls()

    def _number(self, layer: int) -> int:
        return self.layers[layer] if self.layers else layer


@dataclass(frozen=True)
class Plan:
    """The concatenated decisions of a method's steps.

    Args:
        model: what the plan was made for (hub id, folder or name).
        fingerprint: hashes of what decided it: weights, calibration, method.
        operations: in the order in which they were chosen.
        search: what decided it (orders, scores); JSON values only.
        history: what was done to the model before; in an exported folder this plan's operations included, or nothing
            where they alone say it.
    """

    model: str
    operations: tuple[Operation, ...] = ()
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    history: History = History()

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
            **({"history": self._history()} if self.history != History() else {}),
        }

    def _history(self) -> dict[str, Any]:
        return {"operations": _to_json(self.history.operations), "layers": list(self.history.layers)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from parsed JSON.

        Raises:
            UserError: another schema version, an unknown kind of operation, or a missing key.
        """
        if data.get("schema") != SCHEMA:
            raise UserError(f"plan: schema {data.get('schema')!r} is not {SCHEMA}, the version that this code reads")
        history = data.get("history", {})
        return cls(
            model=str(data.get("model", "")),
            operations=_from_json(data.get("operations", ())),
            fingerprint=dict(data.get("fingerprint", {})),
            search=dict(data.get("search", {})),
            history=History(_from_json(history.get("operations", ())), tuple(history.get("layers", ()))),
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
            raise UserError(f"plan: unknown kind of operation {kind!r}; known: {', '.join(OPERATIONS)}")
        try:
            operations.append(OPERATIONS[kind].from_dict(entry))
        except KeyError as missing:
            raise UserError(f"plan: a {kind} operation lacks {missing}") from None
    return tuple(operations)
