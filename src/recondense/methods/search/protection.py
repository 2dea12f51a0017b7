"""What becomes of super experts: where they are after some operations, and which of them the operations lose."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from recondense.methods.search.expert_scores import name_experts
from recondense.methods.step import Record
from recondense.operations import Condense, Constant, Merge, Operation, Prune

UNCHANGED_PLACES = ("factorize", "narrow", "refit")  # kinds of operations that change experts but keep each of them
LOST = {
    "prune": "pruned",
    "condense": "not retained in a condensed layer",
    "merge": "merged with others",
    "constant": "replaced by a constant",
    "drop": "removed with its layer",
}  # kinds of operations that can lose an expert, in words


@dataclass(frozen=True)
class SuperExperts:
    """The super experts of a model.

    Args:
        outputs: for each layer of the uncompressed model, the largest output magnitude of each of its super experts.
    """

    outputs: Mapping[int, Mapping[int, float]]

    def protected(self, operations: Sequence[Operation]) -> dict[int, frozenset[int]]:
        """Return the super experts that remain after some operations, by layer, with their indices after them."""
        places = {
            layer: frozenset(
                place for expert in experts if (place := place_after(layer, expert, operations)[0]) is not None
            )
            for layer, experts in self.outputs.items()
        }
        return {layer: experts for layer, experts in places.items() if experts}

    def lost(self, operations: Sequence[Operation]) -> dict[str, dict[int, list[int]]]:
        """Return the super experts that operations lose: for each kind of operation, by layer."""
        lost: dict[str, dict[int, list[int]]] = {}
        for layer, experts in self.outputs.items():
            for expert in experts:
                place, kind = place_after(layer, expert, operations)
                if place is None:
                    lost.setdefault(kind, {}).setdefault(layer, []).append(expert)
        return lost

    def changed(self, operations: Sequence[Operation]) -> list[int]:
        """Return the layers whose super experts remain but get other weights or become active for every token."""
        kinds = ("factorize", "narrow", "condense")
        layers = {operation.layer for operation in operations if operation.kind in kinds}
        return sorted(layers & self.protected(operations).keys())

    def describe(self) -> str:
        """Return one sentence that names the super experts."""
        named = {layer: list(experts) for layer, experts in self.outputs.items()}
        number = sum(map(len, named.values()))
        experts = "1 super expert makes" if number == 1 else f"{number} super experts make"
        return f"{experts} massive activations, without which the model is wrecked: {name_experts(named)}"

    def warnings(self, operations: Sequence[Operation]) -> list[str]:
        """Return one sentence for each kind of operation that loses super experts."""
        return [
            f"the plan loses super experts, which will probably wreck the model; {LOST[kind]}: {name_experts(experts)}"
            for kind, experts in self.lost(operations).items()
        ]

    def record(self, operations: Sequence[Operation]) -> Record:
        """Return the entry of plan.json's search record."""
        by_name = {
            str(layer): {str(expert): value for expert, value in experts.items()}
            for layer, experts in self.outputs.items()
        }
        lost = {
            kind: {str(layer): named for layer, named in experts.items()}
            for kind, experts in self.lost(operations).items()
        }
        return {"largest_outputs": by_name, "lost": lost, "changed": self.changed(operations)}


def place_after(layer: int, expert: int, operations: Sequence[Operation]) -> tuple[int | None, str]:
    """Return where an expert of a layer is after some operations.

    Args:
        layer: decoder-layer index.
        expert: the expert's index before the operations.
        operations: the operations, in order.

    Returns:
        Its index after them, and an empty string; or None and the kind of the operation that loses it.
    """
    place: int | None = expert
    for operation in operations:
        if operation.layer != layer or operation.kind in UNCHANGED_PLACES:
            continue
        if isinstance(operation, Merge):
            alone = [number for number, group in enumerate(operation.groups) if group == (place,)]
            place = alone[0] if alone else None
        elif operation.kind == "drop":
            place = None
        else:
            experts = operation.experts if isinstance(operation, Condense) else _retained(operation)
            place = experts.index(place) if place in experts else None
        if place is None:
            return None, operation.kind
    return place, ""


def _retained(operation: Operation) -> tuple[int, ...]:
    assert isinstance(operation, Prune | Constant), operation
    return operation.retained


def raise_protected(values: Sequence[float], protected: Collection[int]) -> list[float]:
    """Return the scores of a layer's experts with infinity for the protected ones, so that they are dropped last."""
    return [math.inf if expert in protected else value for expert, value in enumerate(values)]
