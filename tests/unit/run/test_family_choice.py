"""The choice of `model=` for a command that only has a path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.composed import composed
from support.tiny_models import FAMILIES

from recondense.models import config_json
from recondense.models.published_configs import recorded_ids, recorded_values
from recondense.run.family_choice import choice_of
from recondense.run.search_path import CONFIGS

CHOICES = {
    "qwen2_moe": "qwen_moe", "qwen3_moe": "qwen3_moe", "deepseek": "deepseek_moe", "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3", "mixtral": "mixtral", "olmoe": "olmoe", "gpt_oss": "gpt_oss",
    "glm4_moe": "glm4_moe", "ernie4_5_moe": "ernie4_5_moe", "dots1": "general", "solar_open": "general",
    "glm4_moe_lite": "general", "mellum": "general",
}  # fmt: skip


def folder(path: Path, **values: Any) -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_choice(name: str) -> None:
    assert choice_of({"model_type": name, "hidden_size": 32}) == CHOICES[name]
    assert choice_of({"model_type": f"recondense_{name}", "hidden_size": 32}) == CHOICES[name]


@pytest.mark.parametrize("hub_id", recorded_ids())
def test_a_published_checkpoint_has_its_own_choice(hub_id: str) -> None:
    """Two choices are of deepseek_v2: the one with the same sizes is taken."""
    choice = choice_of(recorded_values(hub_id))
    assert yaml.safe_load((CONFIGS / "model" / f"{choice}.yaml").read_text())["model"]["path"] == hub_id
    values = composed(f"model.path={hub_id}", "plan_only=true")
    assert (values["model"]["name"], values["data"]["name"]) == (choice, "c4")


@pytest.mark.parametrize(
    ("model_type", "name"), [("qwen2_moe", "qwen_moe"), ("recondense_mixtral", "mixtral"), ("dots1", "general")]
)
def test_a_path_alone_brings_the_settings_of_its_family(model_type: str, name: str, tmp_path: Path) -> None:
    path = folder(tmp_path, model_type=model_type, hidden_size=32)
    values = composed(f"model.path={path}")
    by_hand = composed(f"model={name}", f"model.path={path}")
    assert values["model"]["budgets"].pop("by_path")
    assert values == by_hand
    assert values["model"]["pretrain"] is None and values["data"]["name"] == "c4"
    recovery = values["recovery"]
    assert (recovery["steps"], recovery["batch_size"], recovery["learning_rate"]) == (1250, 8, 1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        ["data=texts"],
        ["recovery=finetune"],
        ["recovery.steps=7"],
        ["experiment=compare", "method=cdmoe"],
        ["experiment=demo"],
        ["+experiment=demo"],
        ["method=reap", "plan_only=true"],
    ],
    ids=" ".join,
)
def test_what_the_command_says_stays(arguments: list[str], tmp_path: Path) -> None:
    path = folder(tmp_path, model_type="olmoe", hidden_size=32)
    arguments = [text.replace("+experiment", "experiment") for text in arguments]
    values, by_hand = (
        composed(f"model.path={path}", *arguments),
        composed(f"model.path={path}", *arguments, "model=olmoe"),
    )
    assert values["model"]["budgets"].pop("by_path")
    assert values == by_hand


@pytest.mark.parametrize("arguments", [["model=tiny_moe"], ["model=mixtral"], ["experiment=paper/cdmoe_qwen_e4"]])
def test_a_chosen_model_stays(arguments: list[str], tmp_path: Path) -> None:
    values = composed(*arguments, f"model.path={folder(tmp_path, model_type='olmoe')}")
    assert "by_path" not in values["model"]["budgets"] and values["model"]["name"] != "olmoe"


def test_a_path_in_a_file_of_the_user(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", model_type="mixtral", hidden_size=32)
    (tmp_path / "experiment").mkdir()
    text = f"# @package _global_\nmodel:\n  path: {path}\nrecovery:\n  steps: 9\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    values = composed("experiment=mine", config_dir=str(tmp_path))
    assert (values["model"]["name"], values["recovery"]["steps"], values["recovery"]["batch_size"]) == ("mixtral", 9, 8)


@pytest.mark.parametrize("values", [{"model_type": "llama"}, {}, {"model_type": 3}])
def test_a_family_that_is_not_supported_has_the_general_choice(values: dict[str, Any], tmp_path: Path) -> None:
    """What is wrong with it is said by the checks that read the config."""
    assert composed(f"model.path={folder(tmp_path, **values)}")["model"]["name"] == "general"


def test_a_hub_id_is_looked_up_unless_only_sizes_are_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder(tmp_path, model_type="qwen3_moe", hidden_size=32)
    asked = []
    monkeypatch.setattr(config_json, "_from_hub", lambda *where: asked.append(where) or tmp_path / "config.json")
    assert composed("model.path=me/mine", "model.revision=v2")["model"]["name"] == "qwen3_moe"
    assert ("me/mine", "v2") in asked
    asked.clear()
    assert composed("model.path=me/mine", "plan_only=true")["model"]["name"] == "general" and asked == []
