"""What a round adds to a run: its share of the recovery, and its part of the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from recondense.config.rounds import share
from recondense.config.schema import Config
from recondense.config.stages import Stage
from recondense.data.loader import num_rows
from recondense.data.tokens import StageTokens
from recondense.operations import Operation
from recondense.plan import Plan, join
from recondense.run.recover import with_steps
from recondense.run.rounds import Round

SEEDS = 2**32  # the number of seeds
NEXT_SEED = 1_000_003  # from one round to the next, so that runs with neighbouring seeds have no round in common
SUPER_EXPERTS = "super_experts"


def config_of(config: Config, one: Round) -> Config:
    """Return the config of a round's recovery. Each has its own seed, so that the order of the windows differs."""
    return replace(config, seed=(config.seed + (one.number - 1) * NEXT_SEED) % SEEDS)


def stages_of(
    stages: Sequence[Stage], windows: Mapping[str, StageTokens], one: Round
) -> tuple[list[Stage], dict[str, StageTokens]]:
    """Return the stages of a round's recovery with their share of the steps, and the windows by the stages' names.

    Args:
        stages: the stages of the recovery.
        windows: the windows of each stage, by the stage's name.
        one: the round.
    """
    if one.count == 1:
        return list(stages), dict(windows)
    shares = [_share(stage, windows, one) for stage in stages]
    pairs = zip(stages, shares, strict=True)
    return shares, {part.name: windows[stage.name] for stage, part in pairs if stage.name in windows}


def _share(stage: Stage, windows: Mapping[str, StageTokens], one: Round) -> Stage:
    recovery = stage.recovery
    if stage.name in windows:
        recovery = with_steps(recovery, num_rows(windows[stage.name].train), stage.where)
        recovery = replace(recovery, steps=share(recovery.steps, one.number, one.count), epochs=None)
    folder = stage.folder.replace("checkpoints", f"checkpoints/round-{one.number}", 1)
    return replace(stage, name=f"round-{one.number}/{stage.name}", folder=folder, recovery=recovery)


def plan_of(plans: Sequence[Plan]) -> Plan:
    """Return the plan of a run from those of its rounds: their operations (`join`), and the evidence of each round."""
    first, last = plans[0], plans[-1]
    if len(plans) == 1:
        return first
    evidence = [{name: value for name, value in plan.search.items() if name != SUPER_EXPERTS} for plan in plans]
    kept = {name: value for name, value in last.search.items() if name == SUPER_EXPERTS}
    operations: tuple[Operation, ...] = ()
    for plan in plans:
        operations = join(operations, plan.operations)
    return replace(first, operations=operations, search={"rounds": evidence, **kept})
