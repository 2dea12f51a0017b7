"""The recipes of the papers run to their export on tiny models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipes import (
    BY_HAND,
    FAMILY,
    NUMBERS,
    RECIPES,
    SMALL,
    SMALL_OF,
    composed,
    on_cloned_sets,
    paper_of,
    without_the_hub,
)
from support.runs import model_folder, paper_sets
from support.tiny_models import EVERY

from recondense.config.schema import Config, ModelConfig
from recondense.config.stages import require_stages
from recondense.models import loading
from recondense.plan import Plan
from recondense.report.published import PAPER_TASKS

QUICK = {"cdmoe_deepseek_e6", "moei2_deepseek_v2_lite", "moei2_mixtral"}


pytestmark = pytest.mark.usefixtures("as_one_command")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    paper_sets(folder)
    return folder


@pytest.fixture
def finished(
    command: Callable[..., tuple[int, str]], base: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> tuple[str, Config, Path, dict[str, Any]]:
    """The name of a recipe, and the config, folder and summary of its dry run."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", base / "cache")
    name: str = request.param
    model = base / FAMILY[name]
    if not model.exists():
        model_folder(model, EVERY[FAMILY[name]])
    num_experts = ("method.num_experts=3",) if NUMBERS[name].get("method.num_experts") else ()  # of six experts
    inputs = (without_the_hub if name in BY_HAND else on_cloned_sets)(name, base, model)
    arguments = (
        *inputs,
        *SMALL,
        *SMALL_OF[paper_of(name)],
        *num_experts,
        f"output_dir={base / 'out'}",
        f"cache_dir={base / name}",
    )
    code, err = command(f"experiment=paper/{name}", *arguments)
    assert code == 0, err
    config = composed(name, *arguments)
    folder = config.run_folder()
    return name, config, folder, json.loads((folder / "summary.json").read_text())


DRY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("finished", DRY, indirect=True)
def test_a_recipe_runs_to_its_export(finished: tuple[str, Config, Path, dict[str, Any]]) -> None:
    name, config, folder, summary = finished
    assert_recovered(name, config, summary)
    assert_measured(name, summary)

    plan = Plan.load(folder / "plan.json")
    kinds = {operation.kind for operation in plan.operations}
    assert kinds == ({"condense"} if paper_of(name) == "cdmoe" else {"prune", "factorize"})
    if paper_of(name) == "cdmoe":
        num_experts = config.method["num_experts"]
        assert [len(step.experts) for step in plan.operations if step.kind == "condense"] == [num_experts, num_experts]
    model, tokenizer = loading.load(folder / "model", ModelConfig(path=str(folder / "model")))
    assert model.num_parameters() == summary["parameters"]["total"]["compressed"]
    with torch.no_grad():
        assert torch.isfinite(model(**tokenizer("Is 3 odd?", return_tensors="pt")).logits).all()


def assert_recovered(name: str, config: Config, summary: dict[str, Any]) -> None:
    """Every recovery stage ran, with the learning rate and the objective of the recipe."""
    published = require_stages(composed(name))
    for stage, ran, done in zip(published, require_stages(config), summary["recovery_stages"], strict=True):
        assert done["name"] == stage.name
        for key in ("objective", "trainable", "learning_rate"):
            assert done[key] == getattr(stage.recovery, key), key
        epochs, batch = ran.recovery.epochs, ran.recovery.batch_size * ran.recovery.accumulate_grad_batches
        assert done["steps"] == (math.ceil(epochs * done["windows"] / batch) if epochs else ran.recovery.steps)
    last = summary["recovery_stages"][-1]
    assert (last["examples"], last["left_out"]) == ({"cdmoe": 10, "moei2": 12}[paper_of(name)], 0)
    texts = {"train"} if paper_of(name) == "cdmoe" else set()
    assert set(summary["environment"]["data"]) == {"calibration", "validation", f"{last['name']}/train", *texts}


def assert_measured(name: str, summary: dict[str, Any]) -> None:
    """Every result stage has its figures, and the summary has all other entries."""
    paper = paper_of(name)
    assert list(summary["stages"]) == ["original", "compressed", "recovered"]
    for stage, figures in summary["stages"].items():
        assert figures["loss"] > 0 and figures["perplexity"] > 1, stage
        assert set(figures["tasks"]) == set(summary["stages"]["original"]["tasks"]) != set()
        if name not in BY_HAND:
            assert set(figures["tasks"]) == set(PAPER_TASKS[paper]) and set(figures["task_mean"]) == {paper}
    assert summary["stages"]["original"]["profile"]["weights_bytes"] > 0
    assert summary["stages"]["compressed"]["kl_to_original"] > 0
    assert summary["stages"]["recovered"]["loss"] != summary["stages"]["compressed"]["loss"]
    ratios = {"memory", "routed_expert_parameters", "prefill_speedup", "decode_speedup", "gap_closed"}
    assert set(summary["ratios"]) == ratios and 0 < summary["ratios"]["memory"] < 1
    assert set(summary["seconds"]) >= {"calibrate", "search", "apply", "recover", "evaluate", "export"}
    assert summary["artifacts"].keys() >= {"plan", "model", "export_format"}
