"""Allocate the ranks of factorized experts: MoE-I²'s formula, its upper bound, and ranks for a parameter budget.

Legend: D hidden size, F expert width, M' retained experts of a layer, R_a average rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from recondense.errors import UserError

AUTO_KEPT = 0.614  # the fraction that the paper's R_a = 512 keeps of a 2048 x 1408 expert: 512·3456 / 2,883,584
EPSILON = 1e-9

Ranks = list[int | None]  # one per expert; None for a dense expert


def break_even(hidden_size: int, expert_width: int) -> float:
    """Return D·F / (D + F), the rank at which the two factors have as many parameters as the weight."""
    return hidden_size * expert_width / (hidden_size + expert_width)


def automatic_rank(hidden_size: int, expert_width: int) -> int:
    """Return the average rank that keeps 0.614 of an expert's parameters, the fraction used in the paper."""
    return max(1, int(AUTO_KEPT * break_even(hidden_size, expert_width)))


def resolve_multiple(setting: int | str, hidden_size: int, expert_width: int, average_rank: float) -> int:
    """Resolve `rank_multiple`. "auto" is the largest power of two up to a 16th of the average rank (32 for 512).

    A layer then has only a few different ranks. Experts of equal rank are computed by one grouped product, which needs
    rows at multiples of 16 bytes. A multiple above a 24th of the break-even rank has no further advantage, so that is
    another upper bound.

    Args:
        setting: a multiple, or "auto".
        hidden_size: D.
        expert_width: F.
        average_rank: R_a, or the average rank that a budget allows.
    """
    if setting != "auto":
        return int(setting)
    most = min(average_rank / 16, break_even(hidden_size, expert_width) / 24)
    return 1 << (max(1, int(most)).bit_length() - 1)


def multiple_problems(setting: int | str) -> list[str]:
    """List the problems of `rank_multiple`, as sentences."""
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
    """Allocate a rank to every retained expert of a layer, the same for its three projections; None stays dense.

    R_j = floor( (I_j + ε)^α / Σ_j (I_j + ε)^α · R_a · M' )

    The remainder of R_a·M' after rounding down goes to the largest fractions, so that the layer's total is met. A rank
    at or above the break-even saves nothing. Such an expert stays dense, and what remains of its share of the layer's
    R_a·M'·(D + F) parameters is distributed to the other experts, first by the same formula and then in single steps.
    No rank is below one multiple; the largest ranks are lowered in return.

    Args:
        importance: I_j of the layer's retained experts, >= 0.
        average_rank: R_a, >= 1; need not be an integer.
        hidden_size: D.
        expert_width: F.
        alpha: α; 0 gives all experts the same rank.
        multiple: ranks are rounded to multiples of this.
        epsilon: ε.

    Returns:
        One rank per expert.

    Reference: MoE-I², arXiv 2411.01016, section 3.2.
    """
    exact = _exact(importance, average_rank, hidden_size, expert_width, alpha, epsilon)
    steps = [None if rank is None else max(1, math.floor(rank / multiple + 1e-9)) for rank in exact]
    ranks: Ranks = [None if step is None else step * multiple for step in steps]
    shape, unit = (hidden_size, expert_width), 3 * (hidden_size + expert_width)
    budget = math.floor(average_rank * len(ranks) * unit + 1e-6)
    while parameters(ranks, *shape) > budget and _lower(ranks, importance, shape, multiple):
        pass
    pairs = enumerate(zip(ranks, exact, strict=True))
    fractions = [(0.0 if e is None else r - e, 0, j) for j, (r, e) in pairs if r is not None]
    return _fill_up({0: ranks}, fractions, budget - parameters(ranks, *shape), shape, multiple)[0]


def _lower(ranks: Ranks, importance: Sequence[float], shape: tuple[int, int], multiple: int) -> bool:
    """Lower the largest rank by one multiple, in place; return False if no rank can be lowered.

    If no rank is above one multiple, the least important dense expert becomes low-rank.
    """
    largest = max(range(len(ranks)), key=lambda j: (ranks[j] or 0, -j))
    dense = [j for j, rank in enumerate(ranks) if rank is None]
    if (ranks[largest] or 0) > multiple:
        ranks[largest] = (ranks[largest] or 0) - multiple
    elif dense:
        least = min(dense, key=lambda j: (importance[j], -j))
        ranks[least] = max(multiple, (math.ceil(break_even(*shape)) - 1) // multiple * multiple)
    else:
        return False
    return True


def _exact(
    importance: Sequence[float], average_rank: float, hidden_size: int, expert_width: int, alpha: float, epsilon: float
) -> list[float | None]:
    """Compute the formula before rounding; None at or above the break-even."""
    cap = break_even(hidden_size, expert_width)
    shares = [(value + epsilon) ** alpha for value in importance]
    budget = average_rank * len(shares)  # in ranks; a dense expert counts as `cap`
    low = set(range(len(shares)))
    exact: list[float | None] = [None] * len(shares)
    while low:
        total = sum(shares[j] for j in low)
        remaining = budget - cap * (len(shares) - len(low))
        for j in low:
            exact[j] = shares[j] / total * remaining
        dense = {j for j in low if shares[j] / total * remaining >= cap}
        if not dense:
            break
        for j in dense:
            exact[j] = None
        low -= dense
    return exact


def parameters(ranks: Sequence[int | None], hidden_size: int, expert_width: int) -> int:
    """Return the number of parameters of all three projections of experts with these ranks."""
    dense, rank_unit = 3 * hidden_size * expert_width, 3 * (hidden_size + expert_width)
    return sum(dense if rank is None else rank * rank_unit for rank in ranks)


def allocate_budget(
    importance: Mapping[int, Sequence[float]],
    budget: int,
    hidden_size: int,
    expert_width: int,
    alpha: float = 0.15,
    multiple: int = 1,
    epsilon: float = EPSILON,
) -> tuple[float, dict[int, Ranks]]:
    """Find the largest average rank, common to all layers, that meets a budget; single steps then use up the rest.

    Args:
        importance: the importance of the retained experts, by layer.
        budget: the number of parameters that all experts may have together.
        hidden_size, expert_width, alpha, multiple, epsilon: as in `allocate`.

    Returns:
        The average rank, and the ranks by layer. The unused rest of the budget is smaller than one step (`multiple`) of
        one expert, unless all experts are dense.

    Raises:
        UserError: even the lowest rank for all experts exceeds the budget.
    """
    shape = hidden_size, expert_width

    def allocate_all(average_rank: float) -> dict[int, Ranks]:
        return {
            layer: allocate(values, average_rank, *shape, alpha, multiple, epsilon)
            for layer, values in importance.items()
        }

    average = _largest_average(allocate_all, budget, shape, multiple)
    ranks = allocate_all(average)
    if average == break_even(*shape):
        return average, ranks
    fractions = [
        (rank - exact, layer, position)
        for layer, values in importance.items()
        for position, (rank, exact) in enumerate(
            zip(ranks[layer], _exact(values, average, *shape, alpha, epsilon), strict=True)
        )
        if rank is not None and exact is not None
    ]
    return average, _fill_up(ranks, fractions, budget - _size(ranks, shape), shape, multiple)


def raise_ranks(ranks: Ranks, spare: int, hidden_size: int, expert_width: int, multiple: int) -> tuple[Ranks, int]:
    """Raise the ranks of a layer in single steps, the lowest ranks first, until no step fits.

    Args:
        ranks: one rank per expert; None for a dense expert.
        spare: the number of parameters that may be added.
        hidden_size: D.
        expert_width: F.
        multiple: the size of a step.

    Returns:
        The ranks, and the number of parameters that remain.
    """
    shape = hidden_size, expert_width
    order = [(float(rank), 0, position) for position, rank in enumerate(ranks) if rank is not None]
    raised = _fill_up({0: list(ranks)}, order, spare, shape, multiple)[0]
    return raised, spare - (parameters(raised, *shape) - parameters(ranks, *shape))


def _size(ranks: Mapping[int, Ranks], shape: tuple[int, int]) -> int:
    return sum(parameters(layer_ranks, *shape) for layer_ranks in ranks.values())


def _largest_average(
    allocate_all: Callable[[float], Mapping[int, Ranks]], budget: int, shape: tuple[int, int], multiple: int
) -> float:
    """Find the largest average rank, up to the break-even, whose ranks meet a budget, by bisection.

    Raises:
        UserError: even the lowest rank for all experts exceeds the budget.
    """
    low, high = 0.0, break_even(*shape)
    if (least := _size(allocate_all(low), shape)) > budget:
        raise UserError(f"the experts may have {budget:,} parameters, but with rank {multiple} they have {least:,}")
    if _size(allocate_all(high), shape) <= budget:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _size(allocate_all(middle), shape) <= budget else (low, middle)
    return low


def _fill_up(
    ranks: dict[int, Ranks],
    fractions: Sequence[tuple[float, int, int]],
    spare: int,
    shape: tuple[int, int],
    multiple: int,
) -> dict[int, Ranks]:
    """Raise ranks in single steps, the largest fractions first, until `spare` is used up.

    A step that would reach the break-even makes the expert dense.

    Args:
        ranks: the ranks by layer; changed in place.
        fractions: (rank - exact rank, layer, position) of the ranks that may be raised.
        spare: the number of parameters that may be added.
        shape: D and F.
        multiple: the size of a step.

    Returns:
        The ranks.
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
            if cost <= spare:
                ranks[layer][position] = None if dense else rank + multiple
                spare -= cost
                raised = True
    return ranks
