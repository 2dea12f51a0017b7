"""Problems that the config and the folders it names tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.checks import config_messages

from recondense.config.schema import from_dict

BUILT_IN = {"model": {"pretrain": {}}}


def messages(**values: Any) -> list[str]:
    return config_messages(from_dict(BUILT_IN | values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a model, with what is looked for."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    return tmp_path


def test_local_tasks_need_their_folder(tmp_path: Path) -> None:
    local = {"name": "local", "tasks": None}
    assert messages(evaluation=local) == [
        "evaluation.include_path=null: evaluation=local reads the tasks of a folder. Give a folder with lm-eval task "
        "YAMLs."
    ]
    (tmp_path / "one.yaml").touch()
    assert messages(evaluation={**local, "include_path": str(tmp_path)}) == []


def test_a_teacher_has_a_tokenizer_of_its_own(folder: Path) -> None:
    recovery = {"name": "distill", "objective": "distill", "teacher": "model", "teacher_path": str(folder)}
    assert messages(recovery=recovery) == []
    (folder / "tokenizer.json").unlink()
    assert messages(recovery=recovery) == [
        f"recovery.teacher_path={folder}: the folder has no tokenizer. Save the tokenizer there too: it must be the "
        "student's."
    ]
    (folder / "config.json").unlink()
    [problem] = messages(recovery=recovery)
    assert "no config.json" in problem


def test_a_model_has_one_unless_another_folder_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    [problem] = messages(model={"path": str(folder)})
    assert problem.endswith("the folder has no tokenizer. Set model.tokenizer to a folder or hub id that has one.")
    assert messages(model={"path": str(folder), "tokenizer": "some/model"}) == []
    assert messages(model={"path": str(folder)}, plan_only=True) == []


@pytest.mark.parametrize(
    ("data", "setting"),
    [
        ({"source": "texts", "train": {"path": "a.jsonl"}}, "data.validation.path"),
        ({"source": "hub", "dataset": "a/b", "splits": {"train": "train"}}, "data.splits.validation"),
    ],
)
def test_validation_during_training_needs_validation_text(data: dict[str, Any], setting: str) -> None:
    recovery = {"objective": "finetune", "name": "finetune", "validate_every": 5}

    def problems(recovery: dict[str, Any], data: dict[str, Any]) -> list[str]:
        values = messages(recovery=recovery, data={"name": "mine", **data}, method={"name": "none"})
        return [text for text in values if "validat" in text]

    [message] = problems(recovery, data)
    assert message.startswith(f"{setting}=null: recovery.validate_every=5 measures on it (otherwise set it to 0).")
    assert problems({**recovery, "validate_every": 0}, data) == []
    assert problems({**recovery, "objective": "none"}, data) == []
    assert problems(recovery, {"source": "stdlib"}) == []
    alone = [{"name": "one", "data": data}, {"name": "two", "validate_every": 0}]
    [message] = problems({**recovery, "stages": alone}, {"source": "stdlib"})
    where = "recovery.stages[0]"
    assert message.startswith(f"{where}.{setting}=null: {where}.validate_every=5 measures on it")
    assert problems({**recovery, "stages": [{"name": "one"}]}, data)[0].startswith(f"{setting}=null: {where}.validate")


LOCAL = {"name": "local", "objective": "local"}


@pytest.mark.parametrize(
    ("recovery", "message"),
    [
        (
            {"trainable": "lora"},
            "recovery.trainable=lora: recovery.objective=local trains the weights of",
        ),
        ({"trainable": "all"}, "recovery.trainable=all: recovery.objective=local trains"),
        (
            {"trainable": ["experts", "routers"], "router_layers": "all"},
            "recovery.router_layers=all: recovery.objective=local trains changed layers only. Use",
        ),
        ({"validate_every": 5}, "recovery.validate_every=5: recovery.objective=local has no predictions to validate"),
        (
            {"validate_every": 5, "objective": "distill", "stages": [{"name": "first", "objective": "local"}]},
            "recovery.stages[0].validate_every=5: recovery.stages[0].objective=local has no predictions",
        ),
    ],
)
def test_what_a_local_recovery_does_not_have(recovery: dict[str, Any], message: str) -> None:
    values = messages(recovery={**LOCAL, **recovery}, method={"name": "none"})
    assert [text for text in values if text.startswith(message)]
    assert not [text for text in messages(recovery=LOCAL) if "local" in text]


@pytest.mark.parametrize("setting", [{"model": {"streaming": True}}, {"trainer": {"strategy": "fsdp2"}}], ids=str)
def test_local_stages_come_before_those_that_lose_the_original(setting: dict[str, Any]) -> None:
    stages = [{"name": "first", "objective": "local"}, {"name": "second", "objective": "finetune"}]
    for order, expected in ((stages, []), (stages[::-1], ["recovery.stages[1].objective=local"])):
        values = {"recovery": {**LOCAL, "objective": "finetune", "stages": order}, **setting}
        assert [text.partition(":")[0] for text in messages(**values) if "Put this stage first" in text] == expected
    assert not [text for text in messages(recovery={**LOCAL, "stages": stages[::-1]}) if "Put this" in text]
