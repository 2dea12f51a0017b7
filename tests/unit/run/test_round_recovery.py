"""The share of a round in the recovery of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import qwen2_moe, recorded

from recondense.config.rounds import check_share
from recondense.config.schema import Config, from_dict
from recondense.config.stages import require_stages
from recondense.data.loader import ShuffledWindows
from recondense.data.tokens import StageTokens, Tokens
from recondense.errors import UserError
from recondense.models import moe_blocks
from recondense.operations import Drop, Prune, Refit
from recondense.plan import Plan
from recondense.run.prepare import check_steps_of
from recondense.run.round_recovery import config_of, plan_of, stages_of
from recondense.run.rounds import Round
from recondense.surgery.apply import apply

TABLE = {"input_ids": torch.arange(40).reshape(20, 2)}
WINDOWS = StageTokens(TABLE, None, {})


def config(**recovery: Any) -> Config:
    return from_dict({"recovery": {"objective": "distill", "name": "distill", "batch_size": 2, **recovery}})


def test_the_rounds_share_the_steps_and_the_epochs_of_every_stage() -> None:
    stages = require_stages(config(stages=[{"name": "a", "steps": 11}, {"name": "b", "epochs": 1.4}]))
    parts = [stages_of(stages, {"a": WINDOWS, "b": WINDOWS}, Round(number, 3, ())) for number in (1, 2, 3)]
    assert [[stage.recovery.steps for stage in part] for part, _ in parts] == [[3, 4], [3, 4], [5, 6]]
    assert all(stage.recovery.epochs is None for part, _ in parts for stage in part)
    second, windows = parts[1]
    assert [stage.folder for stage in second] == ["checkpoints/round-2/0-a", "checkpoints/round-2/1-b"]
    assert list(windows) == [stage.name for stage in second] == ["round-2/a", "round-2/b"]
    assert stages_of(stages, {"a": WINDOWS}, Round(1, 1, ())) == (list(stages), {"a": WINDOWS})


def test_every_round_has_another_order_of_the_windows_and_the_first_that_of_the_plain_run() -> None:
    seeds = [config_of(Config(seed=2**32 - 1), Round(number, 3, ())).seed for number in (1, 2, 3)]
    orders = [ShuffledWindows(TABLE, 2, 10, seed, lambda: 0).used_windows() for seed in seeds]
    batches = [[batch["input_ids"].tolist() for batch in ShuffledWindows(TABLE, 2, 10, s, lambda: 0)] for s in seeds]
    assert seeds[0] == 2**32 - 1 and all(len(order) == 20 for order in orders)
    assert batches[0] != batches[1] != batches[2] != batches[0]


def test_the_plan_of_all_rounds_can_be_applied_again() -> None:
    """An earlier round refits a layer that a later one drops; refits come last, so only the others are there."""
    refits = [Refit(layer, "down_proj", 0.01) for layer in (0, 1, 2)]
    prunes = [Prune(layer, (0, 1, 2, 4)) for layer in (0, 1, 2)]
    rounds = [(*prunes, *refits), (Drop(1, "layer"), Drop(2, "moe"), Prune(0, (1, 2, 3)), refits[0])]
    plan = plan_of([Plan("tiny", operations) for operations in rounds])
    assert plan.operations == (*prunes, refits[0], *rounds[1])
    model = qwen2_moe()
    student = apply(model, plan, recorded(model))
    assert student.plan == plan and moe_blocks.sparse_blocks(model)[0].num_experts == 3
    further = qwen2_moe()
    student = apply(further, Plan("tiny", rounds[0]), recorded(further), refit=False)
    student.extend(Plan("tiny", rounds[1]))
    assert student.plan.operations == plan.operations


def test_a_warm_up_is_shorter_than_a_round_also_with_epochs() -> None:
    stages = require_stages(config(epochs=1, warmup_steps=5))
    tokens = Tokens(None, None, {"recovery": WINDOWS}, {})
    check_steps_of(stages, tokens, 1)
    with pytest.raises(UserError, match=r"recovery\.warmup_steps=5: must be below 5, the steps of one of 2 rounds"):
        check_steps_of(stages, tokens, 2)
    assert [*check_share("recovery", 10, 4, 2)] == []
