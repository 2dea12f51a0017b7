"""A Plan: the operations that a method decided on, as plain data without tensors.

A Plan fixes choices and shapes; computed weights are in checkpoints and exports. This module needs only the standard
library, so any tool can read a plan.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from recondense.errors import UserError
from recondense.files import write_aside
from recondense.operations import OPERATIONS, Drop, Operation, Refit

SCHEMA = 1


@dataclass(frozen=True)
class History:
    """All operations that were applied to a model, over several runs.

    Args:
        operations: in order. Their layer indices are those of the uncompressed model.
        layers: for each current decoder layer, its index in the uncompressed model. Empty if the indices are the same.
    """

    operations: tuple[Operation, ...] = ()
    layers: tuple[int, ...] = ()

    def extend(self, operations: Sequence[Operation], kept: Sequence[int]) -> History:
        """Return the history after one more run.

        Args:
            operations: the operations of the run. Their layer indices are those of the model that the run started from.
            kept: the decoder layers of that model that the exported model still has.
        """
        numbered = [replace(operation, layer=self._original_number(operation.layer)) for operation in operations]
        layers = tuple(map(self._original_number, kept))
        return History((*self.operations, *numbered), () if layers == tuple(range(len(layers))) else layers)

    def changed_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of the current model that any operation changed, by their current indices.

        Args:
            num_layers: the number of decoder layers of the current model.
        """
        numbers = {operation.layer for operation in self.operations}
        return tuple(layer for layer in range(num_layers) if self._original_number(layer) in numbers)

    @classmethod
    def load(cls, path: str | Path | None) -> History:
        """Read the history from plan.json in a model's folder; return an empty one if there is no such plan."""
        try:
            plan = Plan.load(Path(path, "plan.json")) if path else Plan("")
            return plan.history if plan.history.operations else cls(plan.operations)
        except UserError:  # or the file of that name is another tool's
            return cls()

    def _original_number(self, layer: int) -> int:
        return self.layers[layer] if self.layers else layer


@dataclass(frozen=True)
class Plan:
    """What a search decided: the operations of all steps of a method.

    Args:
        model: the model that the plan was made for (hub id, folder or name).
        operations: in the order in which they were chosen.
        fingerprint: hashes of the weights, the calibration set and the method.
        search: the scores and orders behind the operations; JSON values only.
        history: the operations of earlier runs on the model. In an exported folder it also includes the operations of
            this plan, unless there were no earlier runs: then it is empty.
    """

    model: str
    operations: tuple[Operation, ...] = ()
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    history: History = History()

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers that any operation changes, ascending."""
        return tuple(sorted({operation.layer for operation in self.operations}))

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "fingerprint": dict(self.fingerprint),
            "operations": _to_json(self.operations),
            "search": dict(self.search),
            **({} if self.history == History() else {"history": _history_to_json(self.history)}),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from parsed JSON.

        Raises:
            UserError: the schema version or the kind of an operation is unknown, a key is missing, or a value has the
                wrong type or is invalid.
        """
        _check_types(data, "the plan", operations=list, fingerprint=dict, search=dict, history=dict)
        if data.get("schema") != SCHEMA:
            raise UserError(f"plan: schema {data.get('schema')!r} is not supported; this version reads schema {SCHEMA}")
        history = data.get("history", {})
        _check_types(history, "the history", operations=list, layers=list)
        try:
            layers = tuple(map(operator.index, history.get("layers", ())))
        except TypeError:
            raise UserError(f"plan: layers of the history are not whole numbers: {history['layers']}") from None
        return cls(
            model=str(data.get("model", "")),
            operations=_from_json(data.get("operations", ())),
            fingerprint=dict(data.get("fingerprint", {})),
            search=dict(data.get("search", {})),
            history=History(_from_json(history.get("operations", ())), layers),
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Rebuild a plan from JSON.

        Raises:
            UserError: it is not JSON, or not a plan.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"plan: it is not JSON, or is cut off: {error}") from error
        return cls.from_dict(data)

    def save(self, path: Path) -> None:
        write_aside(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            UserError: the file cannot be read, or it is not a plan; the message names the path.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: the plan cannot be read: {error}") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def join(operations: Sequence[Operation], further: Sequence[Operation]) -> tuple[Operation, ...]:
    """Return the operations of a plan and those of a further one for the same model, as one plan has them.

    Refits come after all other operations, so those of layers that the further plan drops are left out.
    """
    dropped = {operation.layer for operation in further if isinstance(operation, Drop)}
    kept = [one for one in operations if not (isinstance(one, Refit) and one.layer in dropped)]
    return (*kept, *further)


def _to_json(operations: Sequence[Operation]) -> list[dict[str, Any]]:
    entries = [{"kind": operation.kind, **asdict(operation)} for operation in operations]
    return cast(list[dict[str, Any]], json.loads(json.dumps(entries)))  # turns tuples into lists, as in a file


def _history_to_json(history: History) -> dict[str, Any]:
    return {"operations": _to_json(history.operations), "layers": list(history.layers)}


def _from_json(entries: Sequence[Mapping[str, Any]]) -> tuple[Operation, ...]:
    operations = []
    for entry in entries:
        _check_types(entry, "an operation", kind=str)
        kind = entry.get("kind")
        if kind not in OPERATIONS:
            raise UserError(f"plan: unknown kind of operation {kind!r}; known: {', '.join(OPERATIONS)}")
        try:
            operations.append(OPERATIONS[kind].from_dict(entry))
        except UserError:
            raise
        except KeyError as missing:
            raise UserError(f"plan: a {kind} operation lacks {missing}") from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"plan: a {kind} operation has a value of the wrong type: {error} in {entry}") from error
    return tuple(operations)


def _check_types(data: Any, name: str, **types: type) -> None:
    """Check that a part of a plan is an object of JSON, and the types of those of its values that it has.

    Raises:
        UserError: naming the part or the value.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"plan: {name} must be an object of JSON, but it is {str(data)[:80]}")
    for key, expected in types.items():
        if key in data and not isinstance(data[key], expected):
            raise UserError(f"plan: {key} of {name} must be a {expected.__name__}, but it is {str(data[key])[:80]!r}")
