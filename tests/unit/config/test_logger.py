"""W&B's environment variables: they count where the config says nothing, and are checked like the config."""

from __future__ import annotations

import pytest

from recondense.config.logger import (
    WandbConfig,
    check_variables,
    mode_of_variables,
    name_in_sweep,
    with_variables,
)

EVERYTHING = {
    "WANDB_PROJECT": "theirs",
    "WANDB_ENTITY": "team",
    "WANDB_NAME": "night",
    "WANDB_RUN_GROUP": "weekend",
    "WANDB_JOB_TYPE": "train",
    "WANDB_TAGS": "a, b,,c",
    "WANDB_NOTES": "why",
}


def test_variables_count_where_the_config_says_nothing() -> None:
    given = with_variables(WandbConfig(), EVERYTHING)
    expected = WandbConfig("auto", "theirs", "team", "night", "weekend", "train", ("a", "b", "c"), "why")
    assert given == expected
    full = WandbConfig("auto", "mine", "me", "day", "here", "test", ("d",), "because")
    assert with_variables(full, EVERYTHING) == full
    assert with_variables(WandbConfig(), {name: "  " for name in EVERYTHING}) == WandbConfig()


def test_the_runs_of_a_sweep_share_a_group_and_not_a_name() -> None:
    plain = name_in_sweep(WandbConfig(), {}, "default-12", "ab")
    assert (plain.group, plain.name) == ("default-12", None)
    named = name_in_sweep(WandbConfig(), EVERYTHING, "default-12", "ab")
    assert (named.group, named.name, named.project) == ("weekend", "night-ab", "theirs")
    config = name_in_sweep(WandbConfig(group="here", name="day"), EVERYTHING, "default-12", "ab")
    assert (config.group, config.name) == ("here", "day-ab")
    long = name_in_sweep(WandbConfig(name="n" * 128), {}, "s" * 300, "12345678")
    assert (long.name or "").endswith("-12345678") and len(long.name or "") <= 128 and len(long.group or "") == 128


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, None),
        ({"WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": "online"}, "online"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "disabled"),
        ({"WANDB_DISABLED": "YES"}, "disabled"),
        ({"WANDB_DISABLED": "false"}, None),
        ({"WANDB_DISABLED": ""}, None),
    ],
)
def test_the_mode_of_the_variables(environment: dict[str, str], mode: str | None) -> None:
    assert mode_of_variables(environment) == mode


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WANDB_PROJECT": "a/b"}, "WANDB_PROJECT=a/b: the name of a W&B project has 1 to 128 characters"),
        ({"WANDB_PROJECT": "x" * 129}, "WANDB_PROJECT=xxx"),
        ({"WANDB_PROJECT": "50%"}, "none of"),
        ({"WANDB_ENTITY": "my team"}, "WANDB_ENTITY=my team: the name of a W&B user or team"),
        ({"WANDB_TAGS": f"good,{'t' * 65}"}, "WANDB_TAGS=ttt"),
        ({"WANDB_NAME": "n" * 129}, "WANDB_NAME=nnn"),
        ({"WANDB_RUN_GROUP": "two\nlines"}, "WANDB_RUN_GROUP="),
        ({"WANDB_MODE": "ofline"}, "WANDB_MODE=ofline: W&B has no such mode. Use online, offline or disabled."),
        ({"WANDB_BASE_URL": "localhost:8080"}, "WANDB_BASE_URL=localhost:8080: is no address of a W&B server."),
        ({"WANDB_BASE_URL": "http://host:port"}, "is no address"),
    ],
)
def test_variables_are_checked(environment: dict[str, str], said: str) -> None:
    [problem] = check_variables(WandbConfig(), environment)
    assert said in str(problem)


def test_variables_that_are_not_followed_are_not_checked() -> None:
    wrong = {"WANDB_PROJECT": "a/b", "WANDB_TAGS": "t" * 65}
    assert not list(check_variables(WandbConfig(project="mine", tags=("mine",)), wrong))
    assert not list(check_variables(WandbConfig(mode="disabled"), wrong))
    assert not list(check_variables(WandbConfig(), {**wrong, "WANDB_DISABLED": "true"}))
    assert not list(check_variables(WandbConfig(), {**wrong, "WANDB_MODE": "disabled"}))
    assert len(list(check_variables(WandbConfig(mode="offline"), {**wrong, "WANDB_DISABLED": "true"}))) == 2
    assert not list(check_variables(WandbConfig(), EVERYTHING))
