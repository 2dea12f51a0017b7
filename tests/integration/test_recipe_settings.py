"""The recipes of the papers compose, and have the papers' numbers and sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checks import run_messages
from support.recipes import NUMBERS, RECIPES, composed, paper_of

from recondense.config.stages import require_stages
from recondense.models import checkpoint_checks
from recondense.models.config_checks import Checkpoint
from recondense.models.published_configs import recorded_config
from recondense.report.published import PAPER_TASKS
from recondense.run.build_steps import build_steps

CDMOE: dict[str, Any] = {
    "data.source": "hub", "data.dataset": "allenai/c4", "data.subset": "en", "data.calibration.num_samples": 100,
    "data.calibration.max_length": 256, "data.calibration.sources": None, "data.train.num_texts": 10_000,
    "data.bos": True, "method.shared_gate": "mean", "method.expert_search": "greedy", "method.refit": False,
    "method.coefficient_max_length": None,
    "recovery.objective": "finetune", "evaluation.num_fewshot": 0, "evaluation.limit": None,
}  # fmt: skip
MOEI2: dict[str, Any] = {
    "data.bos": True, "method.importance": "layer_output", "method.normalize": False,
    "data.calibration.num_samples": 2048, "data.calibration.sources.0.dataset": "allenai/c4",
    "data.calibration.sources.1.dataset": "tatsu-lab/alpaca", "data.calibration.sources.0.weight": 1.0,
    "data.calibration.sources.1.weight": 1.0, "method.prune_ratio": 0.25, "method.population": 100,
    "method.iterations": 50, "method.num_candidates": 3, "method.block_size": 3, "method.alpha": 0.15,
    "method.rank_multiple": 1, "method.whitening": False, "method.ratio": None, "method.memory_ratio": None,
    "method.removed_expert_ratio": None, "method.refit": False, "evaluation.num_fewshot": 0, "evaluation.limit": None,
}  # fmt: skip
# By recovery stage. MoE-I² has the data and epochs of LLM-Pruner, and so its other settings: batches of 64, rank 8.
LM = {
    "objective": "finetune", "trainable": "experts", "steps": 1250, "epochs": None, "batch_size": 8,
    "accumulate_grad_batches": 1, "learning_rate": 1e-5, "schedule": "linear", "warmup_steps": 0, "gradient_clip": 1.0,
    "weight_decay": 0.01, "betas": (0.9, 0.999),
}  # fmt: skip
SFT = {**LM, "epochs": 1, "batch_size": 16, "learning_rate": 5e-5}
LORA = {
    **LM, "trainable": "lora", "epochs": 2, "accumulate_grad_batches": 8, "learning_rate": 1e-4, "warmup_steps": 100,
    "weight_decay": 0.0, "betas": (0.9, 0.95),
}  # fmt: skip
ALONE, PROMPTS = {"packing": False, "bos": True}, {"answer_only": False}
STAGES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "cdmoe": [
        (LM, {"dataset": "allenai/c4", "sequence_length": 256, "form": None, **ALONE}),
        (SFT, {"dataset": "zwhe99/commonsense_170k", "sequence_length": 128, "form": "alpaca", **ALONE, **PROMPTS}),
    ],
    "moei2": [(LORA, {"dataset": "tatsu-lab/alpaca", "sequence_length": 256, "form": "alpaca", **ALONE})],
}
# Ratio of the model's memory (CD-MoE) or of the routed experts' parameters (MoE-I²), and the row that is printed.
SIZES: dict[str, tuple[str, float, str | None]] = {
    "cdmoe_deepseek_e6": ("memory", 0.7242, "cdmoe: shared+6, 9 layers 0.7242 0.725 55.5"),
    "cdmoe_deepseek_e0": ("memory", 0.7295, "cdmoe: shared+0, 8 layers 0.7295 0.731 55.1"),
    "cdmoe_qwen_e4": ("memory", 0.6954, "cdmoe: shared+4, 9 layers 0.6954 0.697 60.2"),
    "cdmoe_qwen_e0": ("memory", 0.7824, "cdmoe: shared+0, 6 layers 0.7824 0.783 62.6"),
    "cdmoe_qwen_e0_nine": ("memory", 0.6736, "cdmoe: shared+0, 9 layers 0.6736 0.675 60.1"),
    "moei2_qwen": ("routed_expert_parameters", 1 - 0.5398, None),  # the paper has no row of this model
    "moei2_deepseek_v2_lite": ("routed_expert_parameters", 1 - 0.5398, "53.98% 53.98% 14.78 15.03 59.62"),
    "moei2_mixtral": ("routed_expert_parameters", 1 - 0.5179, "51.79% 50.00% 43.49"),
}


pytestmark = pytest.mark.usefixtures("as_one_command")


def setting(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


def test_every_published_result_has_a_recipe() -> None:
    assert set(RECIPES) == set(NUMBERS) == set(SIZES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_papers_numbers(name: str) -> None:
    config = composed(name)
    values = config.resolved()
    expected = {**{"cdmoe": CDMOE, "moei2": MOEI2}[paper_of(name)], **NUMBERS[name], "experiment_name": name}
    assert {key: setting(values, key) for key in expected} == expected
    assert config.evaluation.tasks == PAPER_TASKS[paper_of(name)]
    stages = require_stages(config)
    for stage, (recovery, data) in zip(stages, STAGES[paper_of(name)], strict=True):
        assert {key: getattr(stage.recovery, key) for key in recovery} == recovery
        assert {key: getattr(stage.data, key) for key in data} == data
    if paper_of(name) == "moei2":
        [stage] = stages
        assert stage.recovery.batch_size * stage.recovery.accumulate_grad_batches == 64
        assert stage.data.splits.train == "train[-50000:]"


def test_mmlu_in_the_second_stage() -> None:
    first, second = require_stages(composed("cdmoe_deepseek_e6", "recovery=two_stage_mmlu"))
    [lm, _] = require_stages(composed("cdmoe_deepseek_e6"))
    assert first == lm and first.recovery.weight_decay == second.recovery.weight_decay == 0.01
    recovery, data = second.recovery, second.data
    assert (recovery.learning_rate, recovery.batch_size, recovery.epochs) == (5e-5, 2, 1)
    assert (data.dataset, data.subset, data.splits.train) == ("cais/mmlu", "auxiliary_train", "train")
    assert (data.sequence_length, data.form, data.packing, data.bos, data.answer_only) == (
        *(2048, "commonsense"),
        *(False, True, False),
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_no_problems(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the real shapes of its model, with the recorded config in place of the one on the hub."""
    monkeypatch.setattr(
        checkpoint_checks, "check_checkpoint", lambda path, *_, **__: Checkpoint(recorded_config(path), None, ())
    )
    config = composed(name, f"output_dir={tmp_path}")
    assert run_messages(config, build_steps(config.method)) == []


def test_a_recipe_needs_only_the_hub(command: Callable[..., tuple[int, str]]) -> None:
    """Without the hub, only the model is missing."""
    code, err = command("experiment=paper/moei2_mixtral")
    assert (code, err.count("\n")) == (2, 1), err
    assert "model.path=mistralai/Mixtral-8x7B-v0.1: there is no such folder here, and the hub" in err


@pytest.mark.parametrize("name", RECIPES)
def test_the_published_sizes(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", f"experiment=paper/{name}", "plan_only=true", f"output_dir={tmp_path}"])
        train.main()
    [path] = tmp_path.glob(f"{name}/*-plan_only/summary.json")
    summary, (key, ratio, line) = json.loads(path.read_text()), SIZES[name]
    assert round(summary["ratios"][key], 4) == pytest.approx(ratio)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert line is None or any(line in printed for printed in lines), lines
