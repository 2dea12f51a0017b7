"""Runs that are done are recognized by their config.yaml, although their model is gone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.composed import composed

from recondense.config.schema import Config, from_dict
from recondense.models.published_configs import recorded_values
from recondense.run.checks_without_torch import is_done
from recondense.run.done_runs import as_done


def config(tmp_path: Path, *overrides: str, **changes: Any) -> Config:
    """The config of a command; with changes, its model is Qwen1.5-MoE with these changes, otherwise it is gone."""
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    if changes:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**recorded_values("Qwen/Qwen1.5-MoE-A2.7B"), **changes}))
    return from_dict(composed(f"model.path={folder}", f"output_dir={tmp_path / 'out'}", *overrides))


def finish(config: Config, time: int = 1, **used: Any) -> Config:
    """Write the folder of a run that is done, with a default budget that was lowered to what is used."""
    budgets = dict(config.model.budgets)
    if used:
        budgets |= {"asked": budgets["used"], "used": {**budgets["used"], **used}}
    values = config.resolved()
    values["model"]["budgets"] = budgets
    values["method"] |= used
    config = from_dict(values)
    config.run_folder().mkdir(parents=True)
    (config.run_folder() / "config.yaml").write_text(config.to_yaml())
    (config.run_folder() / "summary.json").write_text("{}")
    os.utime(config.run_folder() / "summary.json", (time, time))
    return config


@pytest.mark.parametrize("model", [[], ["model=qwen_moe"]], ids=str)
@pytest.mark.parametrize(
    "settings", [["method=cdmoe"], ["method=moei2"], ["method=cdmoe_s"], ["method.num_layers=5"]], ids=str
)
@pytest.mark.parametrize("change", [{"vocab_size": 99}, {"num_hidden_layers": 3}], ids=str)
def test_the_defaults_of_a_model_that_is_gone(
    change: dict[str, Any], settings: list[str], model: list[str], tmp_path: Path
) -> None:
    """Of the published shape, and of another one."""
    done = finish(config(tmp_path, *settings, *model, **change))
    again = as_done(config(tmp_path, *settings, *model))
    assert is_done(again) and again.run_folder() == done.run_folder() and again.method == done.method
    assert not is_done(as_done(config(tmp_path, *settings, *model, "method.removed_expert_ratio=0.3")))


@pytest.mark.parametrize("model", [[], ["model=qwen_moe"], ["model=general"]], ids=str)
def test_a_budget_that_was_lowered(model: list[str], tmp_path: Path) -> None:
    done = finish(config(tmp_path, *model, num_hidden_layers=3), memory_ratio=0.7861, num_experts=2)
    assert as_done(config(tmp_path, *model)) == done
    for other in ("method.num_experts=2", "method.memory_ratio=0.75", "model.budgets.default.memory_ratio=0.7"):
        assert not is_done(as_done(config(tmp_path, *model, other)))
    assert not is_done(as_done(config(tmp_path, *model, "experiment_name=other")))
    assert as_done(config(tmp_path, *model, num_hidden_layers=3)).method["memory_ratio"] == 0.75, "it can be computed"


def test_the_latest_run_is_taken_and_others_are_passed_over(tmp_path: Path) -> None:
    for time, ratio in ((3, 0.8), (9, 0.9), (6, 0.85)):
        finish(config(tmp_path, num_hidden_layers=3), time, memory_ratio=ratio)
    (tmp_path / "out/default/broken").mkdir()
    (tmp_path / "out/default/broken/summary.json").write_text("{}")
    (tmp_path / "out/default/broken/config.yaml").write_text("seed: [")
    assert as_done(config(tmp_path)).method["memory_ratio"] == 0.9


@pytest.mark.parametrize("setting", ["output_dir=[a]", "run_dir=3", "experiment_name={a: b}", "output_dir=/no/where"])
def test_without_a_run_the_choice_is_general(setting: str, tmp_path: Path) -> None:
    assert composed(f"model.path={tmp_path / 'none'}", setting)["model"]["name"] == "general"
