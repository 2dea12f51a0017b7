"""Ranks of factorized experts: MoE-I²'s formula, its cap, and what a parameter budget makes of it.

Legend: D hidden size, F expert width, M' retained experts of a layer, R_a average rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from recondense.errors import UserError

AUTO_KEPT = 0.614  # what R_a = 512 keeps of a 2048 x 1408 expert (METHODS: 512·3456 / 2,883,584)
EPSILON = 1e-9

Ranks = list[int | None]


def break_even(hidden_size: int, expert_width: int) -> float:
    """The rank at which two factors have as many parameters as the weight, D·F / (D + F)."""
    return hidden_size * expert_width / (hidden_size + expert_width)


def automatic(hidden_size: int, expert_width: int) -> int:
    """The average rank that keeps 0.614 of an expert, the paper's share."""
    return max(1, int(AUTO_KEPT * break_even(hidden_size, expert_width)))


def multiple_of(setting: int | str, hidden_size: int, expert_width: int, average_rank: float) -> int:
    """What `rank_multiple` means; "auto" is the largest power of two within a 16th of the average rank (32 for 512).

    A layer then has a handful of different ranks. Experts of one rank are computed by one grouped product, and their
    rows lie at the multiples of 16 bytes that such a product asks for. Above a 24th of the break-even rank nothing more
    is gained.

    Args:
        average_rank: R_a, or the rank that a budget leaves to every expert.
    """
    if setting != "auto":
        return int(setting)
    most = min(average_rank / 16, break_even(hidden_size, expert_width) / 24)
    return 1 << (max(1, int(most)).bit_length() - 1)


def multiple_problems(setting: int | str) -> list[str]:
    """What is wrong with `rank_multiple`, as sentences."""
    if setting == "auto" or (isinstance(setting, int) and not isinstance(setting, bool) and setting >= 1):
        return []
    return [f"method.rank_multiple={setting} must be a whole number of at least 1, or auto"]


def allocate(
    importance: Sequence[float],
    average_rank: float,
    hidden_size: int,
    expert_width: int,
    alpha: float = 0.15,
    multiple: int = 1,
    epsilon: float = EPSILON,
) -> Ranks:
    """One rank a retained expert of a layer, the same for its three projections; None stays dense.

    R_j = floor( (I_j + ε)^α / Σ_j (I_j + ε)^α · R_a · M' )

    What rounding down leaves of R_a·M' goes to the largest fractions, so that the layer's total is met. A rank at or
    above the break-even saves nothing: that expert stays dense, and what it does not use of the layer's
    R_a·M'·(D + F) parameters goes to the others by the same formula, then step by step. No rank is below one multiple;
    what that costs the largest ranks pay.

    Args:
        importance: I_j of the layer's retained experts, >= 0.
        average_rank: R_a, >= 1; need not be whole.
        multiple: ranks are rounded to multiples of this.

    Reference: MoE-I², arXiv 2411.01016, section 3.2.
    """
    exact = _exact(importance, average_rank, hidden_size, expert_width, alpha, epsilon)
    steps = [None if rank is None else max(1, math.floor(rank / multiple + 1e-9)) for rank in exact]
    found: Ranks = [None if step is None else step * multiple for step in steps]
    shape, unit = (hidden_size, expert_width), 3 * (hidden_size + expert_width)
    budget = math.floor(average_rank * len(found) * unit + 1e-6)
    while parameters(found, *shape) > budget:
        largest = max(range(len(found)), key=lambda j: (found[j] or 0, -j))
        dense = [j for j, rank in enumerate(found) if rank is None]
        if (found[largest] or 0) > multiple:
            found[largest] = (found[largest] or 0) - multiple
        elif dense:  # the others have nothing left to give: the least important of these becomes low-rank
            least = min(dense, key=lambda j: (importance[j], -j))
            found[least] = max(multiple, (math.ceil(break_even(*shape)) - 1) // multiple * multiple)
        else:
            break
    own = enumerate(zip(found, exact, strict=True))
    fractions = [(0.0 if e is None else r - e, 0, j) for j, (r, e) in own if r is not None]
    return _filled_up({0: found}, fractions, budget - parameters(found, *shape), shape, multiple)[0]


def _exact(
    importance: Sequence[float], average_rank: float, hidden_size: int, expert_width: int, alpha: float, epsilon: float
) -> list[float | None]:
    """The formula before rounding."""
    cap = break_even(hidden_size, expert_width)
    shares = [(value + epsilon) ** alpha for value in importance]
    budget = average_rank * len(shares)  # in ranks; a dense expert takes `cap` of them
    low = set(range(len(shares)))
    found: list[float | None] = [None] * len(shares)
    while low:
        total = sum(shares[j] for j in low)
        left = budget - cap * (len(shares) - len(low))
        for j in low:
            found[j] = shares[j] / total * left
        over = {j for j in low if shares[j] / total * left >= cap}
        if not over:
            break
        for j in over:
            found[j] = None
        low -= over
    return found


def parameters(ranks: Sequence[int | None], hidden_size: int, expert_width: int) -> int:
    """Of all three projections of a layer's experts."""
    dense, rank_unit = 3 * hidden_size * expert_width, 3 * (hidden_size + expert_width)
    return sum(dense if rank is None else rank * rank_unit for rank in ranks)


def within(
    importance: Mapping[int, Sequence[float]],
    budget: int,
    hidden_size: int,
    expert_width: int,
    alpha: float = 0.15,
    multiple: int = 1,
    epsilon: float = EPSILON,
) -> tuple[float, dict[int, Ranks]]:
    """The largest average rank, the same for all layers, whose experts keep a budget; then single steps fill it up.

    Args:
        importance: of the retained experts, layer by layer.
        budget: parameters that all of them may have together.
        multiple: ranks are multiples of this.

    Returns:
        the average rank, and ranks by layer; less than one step (`multiple`) of one expert is left of the budget, if
        some expert is not dense.

    Raises:
        UserError: not even the least rank everywhere keeps the budget.
    """
    shape = hidden_size, expert_width

    def at(average_rank: float) -> dict[int, Ranks]:
        return {
            layer: allocate(values, average_rank, *shape, alpha, multiple, epsilon)
            for layer, values in importance.items()
        }

    def size(ranks: Mapping[int, Ranks]) -> int:
        return sum(parameters(each, *shape) for each in ranks.values())

    low, high = 0.0, break_even(*shape)
    if (least := size(at(low))) > budget:
        raise UserError(f"the experts may keep {budget:,} parameters, but rank {multiple} everywhere has {least:,}")
    if size(at(high)) <= budget:
        return high, at(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(middle)) <= budget else (low, middle)
    found = at(low)
    fractions = [
        (rank - exact, layer, position)
        for layer, values in importance.items()
        for position, (rank, exact) in enumerate(
            zip(found[layer], _exact(values, low, *shape, alpha, epsilon), strict=True)
        )
        if rank is not None and exact is not None
    ]
    return low, _filled_up(found, fractions, budget - size(found), shape, multiple)


def _filled_up(
    ranks: dict[int, Ranks],
    fractions: Sequence[tuple[float, int, int]],
    left: int,
    shape: tuple[int, int],
    multiple: int,
) -> dict[int, Ranks]:
    """Ranks raised by a step, the largest fractions first, as long as the budget lasts; the last step makes one dense.

    Args:
        fractions: (rank less exact rank, layer, position) of those that may rise.
        left: parameters.
    """
    unit, cap = 3 * sum(shape), break_even(*shape)
    order, raised = sorted(fractions), True
    while raised:
        raised = False
        for _, layer, position in order:
            rank = ranks[layer][position]
            if rank is None:
                continue
            dense = rank + multiple >= cap
            cost = 3 * shape[0] * shape[1] - rank * unit if dense else multiple * unit
            if cost <= left:
                ranks[layer][position] = None if dense else rank + multiple
                left -= cost
                raised = True
    return ranks
