"""Recovery stages: what a stage inherits, what is refused, and how epochs become steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.recoveries import recovery

from recondense.config.checks import check_config
from recondense.config.problems import render
from recondense.config.schema import Config, from_dict
from recondense.config.stages import require_stages, resolve_stages
from recondense.data.texts import Texts
from recondense.errors import ConfigError
from recondense.run.recover import with_steps


def config(*stages: dict[str, Any], **more: Any) -> Config:
    values: dict[str, Any] = {
        "recovery": {"name": "mine", "objective": "distill", "steps": 40, "learning_rate": 1e-3, "lora": {"rank": 4}},
        "data": {
            "name": "texts", "source": "texts", "sequence_length": 64, "text_field": "body",
            "train": {"path": "train.txt"}, "calibration": {"path": "calibration.txt", "num_samples": 7},
        },
    }  # fmt: skip
    values["recovery"] |= {"stages": list(stages) if stages else None, **more}
    return from_dict(values)


def problems(*stages: Any, **more: Any) -> list[str]:
    return [text for text in messages(config(*stages, **more)) if "stages" in text]


def messages(settings: Config) -> list[str]:
    resolved, problems = resolve_stages(settings)
    return render([*problems, *check_config(settings, resolved)])


def test_without_stages_the_recovery_is_the_only_stage() -> None:
    plain = config()
    [only] = require_stages(plain)
    assert (only.recovery, only.data, only.own_texts) == (plain.recovery, plain.data, False)
    assert (only.name, only.folder) == ("recovery", "checkpoints")


def test_a_stage_inherits_what_it_does_not_say() -> None:
    first, second = require_stages(
        config(
            {"name": "lm", "objective": "finetune", "steps": 3, "sequence_length": 32},
            {"name": "sft", "epochs": 2, "lora": {"alpha": 99}, "betas": [0.8, 0.9]},
            control=True,
        )
    )
    assert (first.folder, second.folder) == ("checkpoints/0-lm", "checkpoints/1-sft")
    assert (first.recovery.objective, first.recovery.steps, first.recovery.epochs) == ("finetune", 3, None)
    assert (second.recovery.objective, second.recovery.steps, second.recovery.epochs) == ("distill", 40, 2.0)
    assert first.recovery.learning_rate == second.recovery.learning_rate == 1e-3
    assert (second.recovery.lora.rank, second.recovery.lora.alpha, second.recovery.betas) == (4, 99, (0.8, 0.9))
    assert (first.data.sequence_length, second.data.sequence_length) == (32, 64)
    assert first.recovery.control and second.recovery.control
    assert not first.own_texts and first.data.train == second.data.train


def test_steps_of_a_stage_win_over_epochs_of_the_recovery() -> None:
    first, second = require_stages(config({"name": "a", "steps": 5}, {"name": "b"}, epochs=3))
    assert (first.recovery.steps, first.recovery.epochs, second.recovery.epochs) == (5, None, 3.0)


def test_data_with_a_source_stands_alone_and_without_one_changes_the_data_of_the_run() -> None:
    alone, changed = require_stages(
        config(
            {"name": "alone", "data": {"source": "texts", "form": "chat", "train": {"path": "~/mine.jsonl"}}},
            {"name": "changed", "data": {"train": {"num_texts": 9}, "packing": False}},
        )
    )
    assert alone.own_texts and changed.own_texts
    assert alone.data.train.path == str(Path("~/mine.jsonl").expanduser()) and alone.data.calibration.path is None
    assert (alone.data.sequence_length, alone.data.text_field, alone.data.form) == (64, "text", "chat")
    assert (changed.data.train.path, changed.data.train.num_texts) == ("train.txt", 9)
    assert changed.data.calibration.num_samples == 7, "training leaves out the run's calibration set"
    assert (changed.data.text_field, changed.data.packing) == ("body", False)


def test_other_windows_of_the_same_texts_need_no_other_texts() -> None:
    """Documents are read once; length, packing, BOS and targets only change the windows."""
    first, second, third = require_stages(
        config(
            {"name": "cut", "sequence_length": 32, "data": {"packing": False, "bos": True}},
            {"name": "packed", "data": {"bos": False}},
            {"name": "prompts", "data": {"answer_only": False}},
        )
    )
    assert not (first.own_texts or second.own_texts or third.own_texts)
    assert (first.data.packing, first.data.bos, first.data.answer_only) == (False, True, True)
    assert (second.data.packing, second.data.bos, third.data.answer_only) == (True, False, False)


@pytest.mark.parametrize(
    ("stages", "parts"),
    [
        ([{"name": "a", "step": 3}], ["recovery.stages[0].step: there is no such setting", "recovery.stages[0].steps"]),
        ([{"name": "a", "sequence_lenght": 1}], ["Did you mean recovery.stages[0].sequence_length?"]),
        ([{"name": "a", "dta": {}}], ["Did you mean recovery.stages[0].data?"]),
        ([{"name": "a", "data": {"calibratoin": {}}}], ["recovery.stages[0].data.calibratoin: there is no such"]),
        ([{"name": "a", "steps": "x"}], ["recovery.stages[0].steps=x: expected a whole number"]),
        ([{"name": "a", "control": True}], ["recovery.stages[0].control: belongs to the recovery, not to a stage"]),
        ([{"name": "a", "steps": 1, "epochs": 2}], ["recovery.stages[0]: steps=1 and epochs=2 are both set"]),
        ([{"name": "a"}, {"name": "a"}], ["recovery.stages[1].name=a: another stage has this name"]),
        ([{"name": "a/b"}], ["recovery.stages[0].name=a/b: must begin with a letter"]),
        ([{"name": "a" * 65}], ["have at most 64 letters"]),
        ([{"name": "control"}], ["recovery.stages[0].name=control", "none of control, pretrain, recovery"]),
        ([{"name": "a", "data": "alpaca"}], ["recovery.stages[0].data=alpaca: expected a group", "{source: texts"]),
        ([{"name": "a", "data": {"dataset": "x/y"}}], ["recovery.stages[0].data.dataset=x/y", "set source too"]),
        ([{"name": "a", "data": {"calibration": {}}}], ["recovery.stages[0].data.calibration: a stage only trains"]),
        ([{"name": "a", "data": {"sauce": 1}}], ["recovery.stages[0].data.sauce", "recovery.stages[0].data.source?"]),
        ([{"name": "a", "data": {"source": "texts"}}], ["stages[0].data.train.path=null: stage a trains on it"]),
        ([{"name": "a", "data": {"source": "hub", "dataset": "x/y"}}], ["stages[0].data.splits.train=null"]),
        ([{"name": "a", "data": {"source": "stdlib", "form": "auto"}}], ["recovery.stages[0].data.form=auto"]),
        ([{"name": "a", "learning_rate": 0}], ["recovery.stages[0].learning_rate=0: must be above 0"]),
        ([{"name": "a", "epochs": 0}], ["recovery.stages[0].epochs=0: must be above 0"]),
        ([{"name": "a", "batch_size": 0}], ["recovery.stages[0].batch_size=0: must be at least 1"]),
        ([{"name": "a", "data": {"bos": "yes please"}}], ["recovery.stages[0].data.bos=yes please: expected"]),
        ([{"name": "a", "data": {"answer_only": 3}}], ["recovery.stages[0].data.answer_only=3: expected"]),
        ([{"name": "a", "sequence_length": 1}], ["recovery.stages[0].sequence_length=1: must be at least 2"]),
        ([{"name": "a", "steps": 5, "warmup_steps": 5}], ["recovery.stages[0].warmup_steps=5: must be below"]),
        ([{"name": "a", "objective": "none"}], ["recovery.stages[0].objective=none: a stage must train"]),
    ],
)  # fmt: skip
def test_stages_that_are_refused(stages: list[Any], parts: list[str]) -> None:
    refusals = problems(*stages)
    assert len(refusals) == 1, refusals
    for part in parts:
        assert part in refusals[0]


def test_problems_of_the_recovery_are_reported_once() -> None:
    shares = {"hidden_share": 0.6, "cross_entropy_share": 0.6}
    assert [text.partition("=")[0] for text in messages(config({"name": "a"}, {"name": "b"}, **shares))][-1:] == [
        "recovery.hidden_share"
    ]
    assert problems({"name": "a"}, {"name": "b"}, **shares) == []
    assert len(problems({"name": "a"}, {"name": "b", "hidden_share": 0.7}, **shares)) == 1
    empty = from_dict({"recovery": {"objective": "finetune", "stages": []}})
    assert "recovery.stages=[]: name at least one stage, or set it to null." in messages(empty)
    assert any("recovery.objective=none" in text for text in problems({"name": "a"}, objective="none"))
    with pytest.raises(ConfigError, match="there is no such setting"):
        require_stages(config({"name": "a", "x": 1}))


def test_messages_name_the_stages_own_settings(tmp_path: Path) -> None:
    """A path that looks like a setting is shown as it is."""
    path = tmp_path / "data.train.jsonl"
    data = {"source": "texts", "train": {"path": str(path)}}
    with pytest.raises(ValueError, match="there is no such file") as caught:
        settings = config({"name": "a", "data": data})
        Texts.read(settings, require_stages(settings), calibrates=False)
    assert str(caught.value).startswith(f"recovery.stages[0].data.train.path={path}: there is no such file")


def test_epochs_become_steps() -> None:
    settings = recovery(batch_size=4, accumulate_grad_batches=2, steps=99, warmup_steps=0)
    assert with_steps(settings, 100) == settings
    counts = [
        with_steps(recovery(batch_size=4, accumulate_grad_batches=2, epochs=epochs), 100).steps
        for epochs in (1, 2, 0.5)
    ]
    assert counts == [13, 25, 7]
    assert with_steps(recovery(epochs=0.001, warmup_steps=0), 10).steps == 1
    with pytest.raises(ValueError, match=r"here.warmup_steps=3: here.epochs=1 of 5 windows take 3 steps"):
        with_steps(recovery(epochs=1, warmup_steps=3), 5, "here")


@pytest.mark.parametrize("where", ["", "data."])
def test_choices_are_those_that_a_stage_can_have(where: str) -> None:
    wrong: dict[str, Any] = {"zzz": 1}
    stage = {"name": "a", **({"data": wrong} if where else wrong)}
    recovery = {"name": "finetune", "objective": "finetune", "stages": [stage]}
    [problem] = resolve_stages(from_dict({"recovery": recovery}))[1]
    choices = problem.text.partition("Choices: ")[2].rstrip(".").split(", ")
    assert problem.setting == f"recovery.stages[0].{where}zzz"
    assert {"sequence_length", "data"} - ({"data"} if where else set()) <= set(choices)
    assert not {"stages", "control", "calibration"} & set(choices)
