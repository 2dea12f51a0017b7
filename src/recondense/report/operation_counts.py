"""The operations of a plan, counted by kind."""

from __future__ import annotations

from recondense.operations import Condense, Constant, Drop, Factorize, Merge, Narrow, Prune
from recondense.plan import Plan


def operation_counts(plan: Plan, num_experts: int) -> dict[str, dict[str, float]]:
    """Return how many layers each kind of operation changes, and the resulting numbers of experts or ranks.

    Args:
        plan: the plan.
        num_experts: routed experts per layer of the uncompressed model.

    Returns:
        For each kind (drop is split into `drop_moe` and `drop_layer`): `layers`; `retained` and `of` (experts, for
        prune and condense); `fewest` and `most` experts of a layer (for condense, if layers differ); `groups` and `of`
        (for merge); `lowest`, `highest` and `mean` rank (for factorize), or `narrowest`, `widest` and `mean_width` (for
        narrow).
    """
    counts: dict[str, dict[str, float]] = {}
    layers: dict[str, set[int]] = {}
    ranks: list[int] = []
    widths: dict[int, tuple[int, ...]] = {}
    num_now: dict[int, int] = {}  # number of experts by layer, after the operations so far
    for operation in plan.operations:
        name = f"drop_{operation.part}" if isinstance(operation, Drop) else operation.kind
        count = counts.setdefault(name, {"layers": 0})
        before = num_now.get(operation.layer, num_experts)
        again = operation.layer in layers.setdefault(name, set())  # in a later round
        layers[name].add(operation.layer)
        count["layers"] = len(layers[name])
        after, word = before, ""
        if isinstance(operation, Prune | Constant):
            after, word = len(operation.retained), "retained"
        elif isinstance(operation, Condense):
            after, word = len(operation.experts), "retained"
        elif isinstance(operation, Merge):
            after, word = len(operation.groups), "groups"
        elif isinstance(operation, Factorize):
            ranks += [rank for column in operation.ranks.values() for rank in column if rank is not None]
        elif isinstance(operation, Narrow):
            widths[operation.layer] = operation.widths
        if word:
            count[word] = count.get(word, 0) + after - (before if again else 0)
            count["of"] = count.get("of", 0) + (0 if again else before)
        num_now[operation.layer] = after
    condensed = [len(operation.experts) for operation in plan.operations if isinstance(operation, Condense)]
    if len(set(condensed)) > 1:
        counts["condense"] |= {"fewest": min(condensed), "most": max(condensed)}
    if ranks:
        counts["factorize"] |= {"lowest": min(ranks), "highest": max(ranks), "mean": sum(ranks) / len(ranks)}
    if widths:
        flat = [width for of_layer in widths.values() for width in of_layer]
        counts["narrow"] |= {"narrowest": min(flat), "widest": max(flat), "mean_width": sum(flat) / len(flat)}
    return counts
