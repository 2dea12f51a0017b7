"""Whether a fast search found what the brute force found, up to ties that no precision can break."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from support.brute_force import Order

TOLERANCE = 1e-4  # relative: candidates whose scores differ by less are as good as equal
FLOOR = 1e-12  # nats: fp32 hidden states cannot tell scores apart below it


@dataclass(frozen=True)
class Agreement:
    """How two greedy orders compare, step by step."""

    same_order: bool
    num_ties: int  # steps at which another candidate was taken, its score equal within the tolerance
    largest_difference: float  # of the scores after each step, relative
    problems: tuple[str, ...]  # empty: they agree

    @property
    def same_plan(self) -> bool:
        """Whether they agree within the tolerance."""
        return not self.problems


def compare(
    expected: Order, order: Sequence[int], js: Sequence[float], tolerance: float = TOLERANCE, floor: float = FLOOR
) -> Agreement:
    """Hold a search's order and scores against the brute force's.

    Wherever the brute force's scores differ by more than the tolerance the choice must be the same. Where they do not,
    either choice is right; the scores after the step must be equal within the tolerance then and from there on.

    Args:
        expected: What the brute force found.
        order: What the search under test chose, in order.
        js: Its scores after each step, nats.
        tolerance: Relative difference of scores that counts as equal.
        floor: Absolute difference that counts as equal, nats.
    """
    problems, num_ties, largest = [], 0, 0.0
    if not len(order) == len(js) == len(expected.order):
        problems.append(f"{len(order)} choices with {len(js)} scores, where {len(expected.order)} were expected")
    for step, (chosen, value) in enumerate(zip(order, js, strict=False)):
        if step >= len(expected.order):
            break
        least = expected.js[step]
        allowed = tolerance * least + floor
        largest = max(largest, abs(value - least) / max(least, floor))
        if abs(value - least) > allowed:
            problems.append(f"step {step}: score {value:.8g}, expected {least:.8g}")
        if list(order[:step]) != expected.order[:step] or chosen == expected.order[step]:
            continue
        theirs = expected.candidates[step].get(chosen)
        if theirs is None or theirs - least > allowed:
            problems.append(f"step {step}: chose {chosen} (score {theirs}), expected {expected.order[step]} ({least})")
        num_ties += 1
    return Agreement(list(order) == expected.order, num_ties, largest, tuple(problems))
