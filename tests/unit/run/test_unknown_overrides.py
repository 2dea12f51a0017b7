"""Overrides that cannot be placed or resolved are problems, each with its setting."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from recondense.config.problems import Problem, render
from recondense.run.search_path import initialize_hydra
from recondense.run.unknown_overrides import compose_run


def composed(*overrides: str) -> tuple[dict[str, Any] | None, list[str]]:
    problems: list[Problem] = []
    arguments = Namespace(config_path=None, config_dir=None, overrides=list(overrides))
    with initialize_hydra("train", arguments) as loader:
        values = compose_run("train", list(overrides), loader, problems)
    return values, render(problems)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "seed=${oc.env:ABSENT}",
            "seed=${oc.env:ABSENT}: cannot be resolved: Environment variable 'ABSENT' not found. Set the variable, or "
            "write ${oc.env:ABSENT,DEFAULT}.",
        ),
        (
            "output_dir=${HOME}/x",
            "output_dir=${HOME}/x: cannot be resolved: Interpolation key 'HOME' not found. For a variable of the "
            "environment, write ${oc.env:HOME}.",
        ),
        (
            "data.train.path=${SCRATCH}",
            "data.train.path=${SCRATCH}: cannot be resolved: Interpolation key 'SCRATCH' not found. For a variable of "
            "the environment, write ${oc.env:SCRATCH}.",
        ),
        ("recovery.steps=${foo}", "recovery.steps=${foo}: cannot be resolved: Interpolation key 'foo' not found."),
        (
            "recovery.stages=[{name:a,steps:${foo}}]",
            "recovery.stages[0].steps=${foo}: cannot be resolved: Interpolation key 'foo' not found.",
        ),
        (
            "seed=${foo:1}",
            "seed=${foo:1}: cannot be resolved: Unsupported interpolation type foo.",
        ),
    ],
)
def test_an_interpolation_that_cannot_be_resolved(override: str, message: str) -> None:
    values, messages = composed(override, "method=none")
    assert messages == [message]
    assert values is not None and values["experiment_name"] == "default"


def test_all_interpolations_that_cannot_be_resolved() -> None:
    overrides = ("seed=${oc.env:ABSENT}", "output_dir=${oc.env:GONE}", "method=none", "metod=cdmoe")
    _, messages = composed(*overrides, "evaluation=local")
    assert [message.partition(":")[0] for message in messages] == [
        *("metod", "evaluation.include_path", "seed=${oc.env", "output_dir=${oc.env")
    ]


def test_a_value_that_cannot_be_resolved_beside_an_unknown_name() -> None:
    _, messages = composed("seed=${oc.env:ABSENT}", "seed.x=3", "method=none")
    assert len(messages) == 2, messages
