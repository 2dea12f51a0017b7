"""Progressive compression, `method.rounds`: the steps of each round, and what does not work without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from recondense.config.problems import Problem
from recondense.config.rounds import rounds_of
from recondense.errors import UserError
from recondense.methods.step import Step
from recondense.run.sizes import outlined


@dataclass(frozen=True)
class Round:
    """One round of a run.

    Args:
        number: its number, from 1.
        count: the number of rounds. A run with one round is the plain run.
        steps: the steps of the method in this round.
    """

    number: int
    count: int
    steps: Sequence[Step]

    @property
    def is_last(self) -> bool:
        return self.number == self.count

    @property
    def plan_file(self) -> str:
        """The file of the round's plan in the run's folder."""
        return "plan.json" if self.count == 1 else f"rounds/{self.number}/plan.json"


def make_rounds(method: Mapping[str, Any], steps: Sequence[Step], model: PreTrainedModel) -> list[Round]:
    """Return the rounds of a method.

    Args:
        method: settings of the method.
        steps: its steps, in order.
        model: the model before the first round; it may be on the meta device.

    Raises:
        UserError: a step cannot meet its budget.
    """
    count = rounds_of(method)
    if count == 1:
        return [Round(1, 1, steps)]
    return [Round(number, count, _steps(steps, number, count, model)) for number in range(1, count + 1)]


def _steps(steps: Sequence[Step], number: int, count: int, model: PreTrainedModel) -> list[Step]:
    """Return the steps of one of several rounds. Those that cannot be repeated are in the last one."""
    parts = []
    for step in steps:
        part = step.for_round(number, count, model) if step.repeatable else step if number == count else None
        parts += [] if part is None else [part]
    return parts


def steps_of_rounds(method: Mapping[str, Any], steps: Sequence[Step], model: PreTrainedModel) -> list[Step]:
    """Return the steps of all rounds, one after another; the arguments are those of `make_rounds`."""
    return [step for one in make_rounds(method, steps, model) for step in one.steps]


def check_rounds(method: Mapping[str, Any], steps: Sequence[Step], model: PreTrainedModel) -> Iterator[Problem]:
    """Yield the problems of rounds that show without weights.

    Args:
        method, steps: as for `make_rounds`.
        model: the model on the meta device.
    """
    count = rounds_of(method)
    if count == 1:
        return
    if not any(step.repeatable for step in steps):
        text = f"method={method.get('name')} cannot compress again what it has compressed. Use method.rounds=1."
        yield Problem("method.rounds", text, count)
        return
    try:
        with outlined(model, steps):
            pass
    except UserError as error:  # one round has the same problem
        yield Problem("", f"{error}.")
        return
    before: list[Step] = []
    try:
        for one in make_rounds(method, steps, model):
            with outlined(model, before) as earlier:
                removed = len(earlier)
            before += one.steps
            with outlined(model, before) as operations:
                if len(operations) == removed:
                    text = f"round {one.number} would have nothing to remove. Use fewer rounds."
                    yield Problem("method.rounds", text, count)
                    return
    except UserError as error:
        text = f"not every round can reach its share, but one round reaches the whole: {error}. Use fewer rounds."
        yield Problem("method.rounds", text, count)
