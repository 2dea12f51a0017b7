"""`method.rounds`: its value, the share of each round, and the settings with which it does not work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recondense.config.method_steps import step_entries
from recondense.config.problems import Problem
from recondense.config.schema import Config
from recondense.config.stages import Stage


def rounds_of(method: Mapping[str, Any]) -> int:
    """Return the number of rounds of a method; 1 if the setting is missing or invalid, which `check_rounds` reports."""
    count = method.get("rounds", 1)
    return count if _is_valid(count) else 1


def _is_valid(count: Any) -> bool:
    return isinstance(count, int) and not isinstance(count, bool) and count >= 1


def share(total: int, number: int, count: int) -> int:
    """Return the steps of one of several rounds: equal shares, and the rest in the last round."""
    return total // count + (total % count if number == count else 0)


def check_rounds(config: Config, stages: Sequence[Stage]) -> Iterator[Problem]:
    """Yield the problems of several rounds that show from the config alone.

    Args:
        config: the config of the run.
        stages: the resolved stages of the recovery.
    """
    count = config.method.get("rounds", 1)
    if not _is_valid(count):
        yield Problem("method.rounds", "must be a whole number of at least 1.", count)
    if rounds_of(config.method) == 1:
        return
    if not step_entries(config.method):
        yield Problem("method.rounds", "there is no step to repeat. Use method.rounds=1.", count)
    if config.model.streaming:
        text = "rounds train the model in between, which needs all of it in memory. Use model.streaming=false."
        yield Problem("method.rounds", text, count)
    if config.trainer.shards and config.recovery.objective != "none":
        text = (
            f"after a round, trainer={config.trainer.strategy} leaves no whole model to compress further. Use "
            "trainer=ddp, or method.rounds=1."
        )
        yield Problem("method.rounds", text, count)
    for stage in stages:
        recovery = stage.recovery
        if recovery.objective != "none" and recovery.epochs is None:
            yield from check_share(stage.where, recovery.steps, recovery.warmup_steps, count)


def check_share(where: str, steps: int, warmup_steps: int, count: int) -> Iterator[Problem]:
    """Yield the problem of a training that is too short for so many rounds.

    Args:
        where: the dotted name of the training in the config.
        steps: its steps in all rounds.
        warmup_steps: its warm-up steps in each round.
        count: the number of rounds.
    """
    least = share(steps, 1, count)
    if least < 1:
        yield Problem("method.rounds", f"must be at most {where}.steps={steps}, so that every round trains.", count)
    elif least <= warmup_steps < steps:
        text = (
            f"must be below {least}, the steps of one of {count} rounds, or the learning rate never reaches its peak."
        )
        yield Problem(f"{where}.warmup_steps", text, warmup_steps)
