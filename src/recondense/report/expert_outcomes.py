"""What a plan does with each expert of an uncompressed layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recondense.report.figures import GREEN, ORANGE, PURPLE, SKY

# Outcome of an expert: (colour, text of the legend).
OUTCOMES = {
    "kept": ("#DDDDDD", "kept"),
    "dense": (PURPLE, "kept dense in a factorized layer"),
    "condensed": (ORANGE, "condensed: always active; number: order of selection"),
    "dropped": ("white", "dropped"),
    "constant": ("#F0E8C8", "replaced by a constant"),
    "removed": ("white", "feed-forward block removed"),
    "skipped": ("white", "layer removed"),
    "merged": (SKY, "merged; number: its group"),
    "narrowed": (GREEN, "narrowed; number: its width"),
}
Outcome = tuple[str, int | None]  # key of OUTCOMES or "factorized", and the number to draw on the expert


def outcomes_of(layer: int, operations: Sequence[Mapping[str, Any]], num_experts: int) -> list[Outcome]:
    """Return the outcome of each expert of an uncompressed layer.

    Args:
        layer: index of the layer.
        operations: operations of the plan, as JSON values.
        num_experts: routed experts of the uncompressed layer.
    """
    outcomes: list[Outcome] = [("kept", None)] * num_experts
    # For each expert after the operations so far, the experts of the uncompressed layer of which it consists.
    parts: list[tuple[int, ...]] = [(expert,) for expert in range(num_experts)]
    for operation in (entry for entry in operations if entry["layer"] == layer):
        kind = operation["kind"]
        if kind == "drop":
            return [("removed" if operation["part"] == "moe" else "skipped", None)] * num_experts
        if kind in ("prune", "constant"):
            gone = {e for index, part in enumerate(parts) if index not in operation["retained"] for e in part}
            parts = [parts[index] for index in operation["retained"]]
            word = "dropped" if kind == "prune" else "constant"
            outcomes = [(word, None) if e in gone else outcome for e, outcome in enumerate(outcomes)]
        elif kind == "condense":
            order = {e: place for place, index in enumerate(operation["experts"], start=1) for e in parts[index]}
            outcomes = [("condensed", order[e]) if e in order else ("dropped", None) for e in range(num_experts)]
        elif kind == "merge":
            parts = [tuple(expert for index in group for expert in parts[index]) for group in operation["groups"]]
            for number, group in enumerate(parts):
                for expert in group:
                    outcomes[expert] = ("merged", number)
        elif kind == "narrow":
            for part, mask in zip(parts, operation["masks"], strict=True):
                for expert in part:
                    if outcomes[expert][0] in ("kept", "narrowed"):
                        outcomes[expert] = ("narrowed", int(mask, 16).bit_count())
        elif kind == "factorize":
            for part, rank in zip(parts, operation["ranks"]["gate_proj"], strict=True):
                for expert in part:
                    if rank is not None:
                        outcomes[expert] = ("factorized", rank)
                    elif outcomes[expert][0] == "kept":
                        outcomes[expert] = ("dense", None)
    return outcomes
