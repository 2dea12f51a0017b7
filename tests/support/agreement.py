"""Whether a fast search and the brute force agree, up to ties that no precision can break."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from support.brute_force import Order

TOLERANCE = 1e-4  # relative: candidates whose scores differ by less count as equal
FLOOR = 1e-12  # nats: fp32 hidden states cannot tell scores apart below it


@dataclass(frozen=True)
class Agreement:
    """How two greedy orders compare, step by step."""

    same_order: bool
    num_ties: int  # steps that took another candidate, whose score is equal within the tolerance
    largest_difference: float  # of the scores after each step, relative
    problems: tuple[str, ...]  # empty if they agree

    @property
    def same_plan(self) -> bool:
        """Whether they agree within the tolerance."""
        return not self.problems


def compare(
    expected: Order, order: Sequence[int], js: Sequence[float], tolerance: float = TOLERANCE, floor: float = FLOOR
) -> Agreement:
    """Compare a search's order and scores with the brute force's.

    Where the brute force's scores differ by more than the tolerance, both must choose the same candidate. Elsewhere
    either candidate is right, but the scores after this step and all later ones must be equal within the tolerance.

    Args:
        expected: The brute force's order.
        order: The choices of the search under test, in order.
        js: Its scores after each step, nats.
        tolerance: Relative difference of scores that counts as equal.
        floor: Absolute difference that counts as equal, nats.
    """
    problems, num_ties, largest = [], 0, 0.0
    if not len(order) == len(js) == len(expected.order):
        problems.append(f"{len(order)} choices with {len(js)} scores, where {len(expected.order)} were expected")
    for step, (candidate, value) in enumerate(zip(order, js, strict=False)):
        if step >= len(expected.order):
            break
        least = expected.js[step]
        allowed = tolerance * least + floor
        largest = max(largest, abs(value - least) / max(least, floor))
        if abs(value - least) > allowed:
            problems.append(f"step {step}: score {value:.8g}, expected {least:.8g}")
        if list(order[:step]) != expected.order[:step] or candidate == expected.order[step]:
            continue
        score = expected.candidates[step].get(candidate)
        if score is None or score - least > allowed:
            problems.append(
                f"step {step}: chose {candidate} (score {score}), expected {expected.order[step]} ({least})"
            )
        num_ties += 1
    return Agreement(list(order) == expected.order, num_ties, largest, tuple(problems))
