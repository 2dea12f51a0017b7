"""Several wrong settings at once: which problems are reported together, and which are not reported at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.refusals import assert_refused, without_recovery

Command = Callable[..., tuple[int, str]]


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("model.path=/nowhere/at/all", "there is no such folder"),
        ("model.path=[a,b]", "expected a string"),
        ("model.path=/a(b", "model.path=/a(b: the value has special characters. Quote it: 'model.path=\"/a(b\"'."),
        ("model.path=runs/lr=1/model", "'model.path=\"runs/lr=1/model\"'"),
        ('model.path=it\'s a "model"', '\'model.path="it\'"\'"\'s a \\"model\\""\''),
        ("model.path=${HOME", "model.path=${HOME: the ${ has no }. Write ${setting}, or ${oc.env:VARIABLE}."),
        ("model.path=[a,b", "model.path=[a,b: the brackets or commas cannot be read."),
        ("model.path=a,b", "or quote one value: 'model.path=\"a,b\"'"),
        ("model.path=~/x", "'model.path=\"~/x\"'"),
        ("model.pth=/a", "Did you mean model.path?"),
    ],
)
def test_a_bad_path_is_the_only_problem(command: Command, argument: str, part: str) -> None:
    """The hub id of model=qwen_moe is not looked up instead."""
    code, err = command("model=qwen_moe", "data=stdlib", argument, "recovery=none")
    assert_refused(code, err, [part])
    assert len(err.strip().splitlines()) == 1, err


def test_problems_are_reported_together(command: Command) -> None:
    code, err = command(
        "method=cdmoee", "recovery.stepz=3", "recovery.steps=many", "data=texts", "method.num_experts=99", "seed=-1",
        "data.calibration.path=/nowhere.jsonl", "model.experts=batched_mm", "model.device=cpu", "recovery=none",
    )  # fmt: skip
    assert_refused(code, err, ["recondense: 6 problems", " 1. ", " 6. "])
    assert len(err.strip().splitlines()) == 7, err
    parts = ("method=cdmoee", "recovery.stepz", "recovery.steps=many", "/nowhere.jsonl", "batched_mm", "seed=-1")
    for part in parts:
        assert part in err


WRONG_FOR_THE_MODEL = ("method.num_experts=99", "method.memory_ratio=0.01", "trainer.num_nodes=2", "recovery=none")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], []),
        (["seed=-1"], ["seed=-1"]),
        (["data=texts", "data.calibration.path=/nowhere.jsonl"], ["/nowhere.jsonl: there is no such file"]),
        (["run_dir=/proc"], ["run_dir=/proc: the folder is not empty"]),
        (["model.experts=batched_mm", "model.device=cpu"], ["60 times slower"]),
    ],
)
def test_what_needs_the_model_is_reported_with_all_else(command: Command, words: list[str], parts: list[str]) -> None:
    code, err = command(*WRONG_FOR_THE_MODEL, *words)
    expected = ["method.num_experts=99", "method.memory_ratio=0.01", "num_nodes=2", *parts]
    assert_refused(code, err, [f"recondense: {len(expected)} problems", *expected])


@pytest.mark.parametrize(
    ("word", "part"),
    [("recovery.stepz=4", "no such setting"), ("recovery.steps=many", "a whole number"), ("data=foo", "no such data")],
)
def test_a_wrong_name_or_type_comes_first(command: Command, word: str, part: str) -> None:
    """What is meant is not known, so that nothing of it can be checked on a model."""
    code, err = command(*WRONG_FOR_THE_MODEL, word)
    assert_refused(code, err, [f"recondense: {word.partition('=')[0]}", part])
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["model.path=/nowhere", "method.memory_ratio=0.01", "method.num_layers=2"], ["/nowhere", "a budget decides"]),
        (["method.refit=all", "trainer.num_nodes=2"], ["method.refit=all", "num_nodes=2"]),
        (["method.steps=3", "trainer.num_nodes=2"], ["method.steps=3", "num_nodes=2"]),
        (["evaluation.include_path=/nowhere", "trainer.num_nodes=2"], ["include_path=/nowhere", "num_nodes=2"]),
        (
            ["recovery=finetune", "recovery.batch_size=0", "trainer.devices=3", "method.num_experts=99"],
            ["recovery.batch_size=0", "method.num_experts=99"],
        ),
        (
            ["recovery=distill", "recovery.teacher=model", "recovery.teacher_path=./nowhere", "method.num_experts=99"],
            ["recovery.teacher_path=./nowhere", "method.num_experts=99"],
        ),
        (
            ["recovery=distill", "recovery.steps=-1", "trainer.devices=3", "method.num_experts=99"],
            ["recovery.steps=-1", "recovery.batch_size=4: each of 3 processes", "method.num_experts=99"],
        ),
        (["method=moei2", "seed=-1", "method.parents=100"], ["seed=-1", "below method.population=100"]),
    ],
)
def test_nothing_is_said_of_what_stands_in_place_of_a_wrong_value(
    command: Command, words: list[str], parts: list[str]
) -> None:
    code, err = command(*without_recovery(tuple(words)))
    assert_refused(code, err, [f"recondense: {len(parts)} problems", *parts])


@pytest.mark.parametrize("setting", ["seed=x", "method.normalize=maybe"])
def test_a_wrong_setting_of_two_steps_is_reported_once(command: Command, setting: str) -> None:
    """The step is not made, so its own check does not report the setting again."""
    code, err = command("method=moei2", setting, "recovery=none")
    assert_refused(code, err, [f"recondense: {setting}: expected"])
    assert len(err.strip().splitlines()) == 1, err
