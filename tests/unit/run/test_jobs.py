"""The runs of a command, and what is said of overrides that give none."""

from __future__ import annotations

from argparse import Namespace

import pytest

from recondense.config.problems import Problem, render
from recondense.run.jobs import split_jobs
from recondense.run.search_path import initialize_hydra


def jobs_of(*overrides: str, multirun: bool = True) -> tuple[list[tuple[str, ...]], list[str]]:
    problems: list[Problem] = []
    arguments = Namespace(config_path=None, config_dir=None, overrides=list(overrides))
    with initialize_hydra("train", arguments) as loader:
        jobs = split_jobs(overrides, {"sweeper": {}}, multirun, loader, problems)
    return [job for job, _ in jobs], render(problems)


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("method=glob(cdmoe*)", ["cdmoe", "cdmoe_moei2", "cdmoe_s"]),
        ("method=glob([cdmoe*,reap],exclude=*_*)", ["cdmoe", "reap"]),
        ("seed=range(3)", ["0", "1", "2"]),
        ("seed=range(5,1,-2)", ["5", "3"]),
        ("method.memory_ratio=range(0.5,0.75,0.1)", ["0.5", "0.6", "0.7"]),
        ("seed=choice(1,2)", ["1", "2"]),
        ("seed=tag(small,choice(1,2))", ["1", "2"]),
        ("seed=sort(3,1,2)", ["1", "2", "3"]),
        ("seed=7", ["7"]),
    ],
)
def test_sweeps(override: str, values: list[str]) -> None:
    jobs, problems = jobs_of(override)
    assert problems == []
    assert [job[0].partition("=")[2] for job in jobs] == values


def test_a_shuffled_sweep_has_all_runs() -> None:
    jobs, problems = jobs_of("seed=shuffle(range(4))", "method=shuffle(cdmoe,reap)")
    assert problems == []
    assert sorted(jobs) == sorted((f"seed={seed}", f"method={name}") for seed in range(4) for name in ("cdmoe", "reap"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=glob(zz*)", "method=glob(zz*): no method matches. Choices: "),
        ("method=glob(*)", "method=glob(*): also matches _base"),
        ("seed=glob(*)", "seed=glob(*): only choices of a group match."),
        ("seed=range(1,5,0)", "a range needs finite numbers, and a step that is not 0."),
        ("method.alpha=range(0.5,5.0,0.0)", "a range needs finite numbers, and a step that is not 0."),
        ("method.alpha=range(0.5,inf)", "a range needs finite numbers"),
        ("seed=range(1,9000000000)", "a range of more than 10000 values."),
        ("seed=range(5,1)", "seed=range(5,1): there is no value in it."),
        ("seed=interval(0,1)", "only Optuna can sweep an interval."),
    ],
)
def test_sweeps_that_give_no_runs(override: str, message: str) -> None:
    jobs, problems = jobs_of(override, "recovery=none")
    assert len(problems) == 1 and message in problems[0], problems
    assert jobs == [("recovery=none",)], "the rest is still checked"


def test_more_runs_than_can_be_checked() -> None:
    assert jobs_of("seed=range(9999)", "method.num_layers=1,2") == (
        [],
        ["-m: these are 19998 runs; at most 10000 can be checked and compared."],
    )


@pytest.mark.parametrize("override", ["method=cdmoe,reap", "seed=range(3)", "method=glob(cdmoe*)", "seed=choice(1,2)"])
def test_one_run_has_one_value(override: str) -> None:
    jobs, problems = jobs_of(override, multirun=False)
    assert jobs == [()]
    assert problems == [f"{override}: one run cannot have several values. Add -m to run each."]
