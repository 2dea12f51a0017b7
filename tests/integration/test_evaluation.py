"""Evaluation of a run and of its exported folder: by the run itself, by train.py alone, by lm-eval's own command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.runs import NORMALISED, config, model_folder, one_command, paper_tasks, text_files

from recondense.config.schema import EvaluationConfig, HeldoutConfig
from recondense.evaluation.heldout_tasks import HELDOUT_TASKS
from recondense.methods.cdmoe import CDMoE
from recondense.methods.saliency import SaliencyPruning
from recondense.methods.search.budget import Budget
from recondense.recovery.module import RecoveryModule
from recondense.report import published
from recondense.report.published import CDMOE, DEEPSEEK, PAPER_TASKS, model_named
from recondense.run import measure, pipeline
from recondense.run.measure import Evaluator

Command = Callable[..., tuple[int, str]]
LmEval = Callable[[Path, list[str], Path, Path], dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    model_folder(folder / "model")
    text_files(folder / "texts")
    paper_tasks(folder / "tasks")
    return folder


def run(base: Path, output: Path, shared_gate: str) -> dict[str, Any]:
    """Two of three layers condensed; the paper's tasks and the held-out ones are run before and after."""
    settings = config(base / "model", text_files(base / "texts"), output, name="none", objective="none")
    evaluation = EvaluationConfig(
        name="paper_cdmoe",
        tasks=(*PAPER_TASKS[CDMOE], *HELDOUT_TASKS),
        include_path=str(base / "tasks"),
        heldout=HeldoutConfig(num_choices=2, num_questions=20, num_texts=2),
        perplexity_windows=8,
    )
    with one_command():
        pipeline.run(replace(settings, evaluation=evaluation), [CDMoE(2, 2, shared_gate=shared_gate)])
    return json.loads((output / "run" / "summary.json").read_text())


@pytest.fixture(scope="module")
def stock(base: Path) -> dict[str, Any]:
    found = run(base, base / "stock", "mean")
    assert found["artifacts"]["export_format"] == "stock"
    return found


def test_means_stand_under_each_stage(stock: dict[str, Any]) -> None:
    assert list(stock["stages"]) == ["original", "compressed"]
    for stage in stock["stages"].values():
        scores = [stage["tasks"][task]["acc_norm" if task in NORMALISED else "acc"] for task in PAPER_TASKS[CDMOE]]
        assert stage["task_mean"] == {CDMOE: pytest.approx(sum(scores) / 8)}
    assert stock["published"] == {"rows": []}


def alone(command: Command, model: Path, output: Path, *arguments: str) -> dict[str, Any]:
    """The summary of train.py's evaluation of a folder, with no text at all."""
    with one_command():
        code, err = command(
            "method=none", "recovery=none", f"model.path={model}", f"output_dir={output}", f"run_dir={output / 'run'}",
            "data=texts", "callbacks.profile.enabled=false", "logger.wandb.mode=disabled", *arguments,
        )  # fmt: skip
    assert code == 0, err
    assert "calibrating" not in err and ("exporting" in err) == ("export.enabled=true" in arguments)
    found = json.loads((output / "run" / "summary.json").read_text())
    assert list(found["stages"]) == ["original"] and "perplexity" not in found["stages"]["original"]
    assert found["ratios"] == {} and set(found["parameters"]["total"]) == {"original"}
    return found


def test_a_folder_alone_is_evaluated(stock: dict[str, Any], base: Path, command: Command, tmp_path: Path) -> None:
    """The exported folder gives the run's own numbers; nothing is calibrated, trained, compared or exported again."""
    model = base / "stock" / "run" / "model"
    found = alone(command, model, tmp_path, "evaluation=paper_cdmoe", f"evaluation.include_path={base / 'tasks'}")
    compressed = stock["stages"]["compressed"]
    for task in PAPER_TASKS[CDMOE]:
        assert found["stages"]["original"]["tasks"][task] == pytest.approx(compressed["tasks"][task], abs=1e-6), task
    assert found["stages"]["original"]["task_mean"] == pytest.approx(compressed["task_mean"])
    assert found["model"] == str(model)
    assert not (tmp_path / "run" / "model").exists() and found["artifacts"] == {}
    asked = alone(command, model, tmp_path / "asked", "evaluation=none", "export.enabled=true")
    assert asked["artifacts"] == {"model": "model", "export_format": "stock"}


def test_a_folder_without_moe_layers_is_evaluated_on_local_tasks(
    base: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All layers condensed: a dense model by its config. Every task of the folder is run."""
    settings = config(base / "model", text_files(base / "texts"), tmp_path / "first", name="none", objective="none")
    with one_command():
        pipeline.run(settings, [CDMoE(2, "all")])
    capsys.readouterr()  # of the first run
    arguments = ("evaluation=local", f"evaluation.include_path={base / 'tasks'}")
    found = alone(command, tmp_path / "first" / "run" / "model", tmp_path / "second", *arguments)
    assert set(found["stages"]["original"]["tasks"]) == set(PAPER_TASKS[CDMOE])


def test_published_rows_of_a_known_model(
    base: Path, stock: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The small model is taken for DeepSeekMoE-16B by its numbers: before, by its plan, and after, by its folder's."""
    values = json.loads((base / "model" / "config.json").read_text())
    small = replace(
        model_named(DEEPSEEK),
        model_type=values["model_type"],
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_experts=values["num_experts"],
    )
    monkeypatch.setattr(published, "MODELS", (small,))
    monkeypatch.setattr("recondense.report.beside_published.MODELS", (small,))
    found = run(base, tmp_path, "mean")["published"]
    assert found["model"] == DEEPSEEK
    assert [row["mean"] for row in found["rows"]] == [61.6, 59.2], (
        "E(2+0) at three layers is the nearest to E(2+2) at two"
    )
    assert [row["same"] for row in found["rows"]] == [True, False]


def lm_eval_command(model: Path, tasks: list[str], folder: Path, output: Path) -> dict[str, dict[str, float]]:
    """What lm-eval's own command line finds of a folder, in another process."""
    done = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "--model", "hf",
            "--model_args", f"pretrained={model},trust_remote_code=True", "--tasks", ",".join(tasks),
            "--include_path", str(folder), "--device", "cpu", "--batch_size", "8", "--output_path", str(output),
        ],
        cwd=output.parent, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(output / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = output.rglob("results_*.json")
    found = json.loads(path.read_text())["results"]
    return {
        task: {key.removesuffix(",none"): value for key, value in metrics.items() if key.endswith(",none")}
        for task, metrics in found.items()
    }


def lm_eval_function(model: Path, tasks: list[str], folder: Path, output: Path) -> dict[str, dict[str, float]]:
    """The same by the function behind it, with an index of these tasks alone: lm-eval's own has 14,000."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        "hf", model_args=f"pretrained={model}", tasks=tasks, device="cpu", batch_size=8,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )["results"]  # fmt: skip
    return {
        task: {key.removesuffix(",none"): value for key, value in metrics.items() if key.endswith(",none")}
        for task, metrics in found.items()
    }


def same_numbers(
    base: Path, run_folder: Path, summary: dict[str, Any], tmp_path: Path, lm_eval: LmEval = lm_eval_command
) -> None:
    tasks = [*PAPER_TASKS[CDMOE], *HELDOUT_TASKS]
    folder = tmp_path / "tasks"  # lm-eval's command takes one folder
    shutil.copytree(base / "tasks", folder)
    [heldout] = (run_folder.parent / "cache" / "tasks").iterdir()
    for path in heldout.glob("*.yaml"):
        shutil.copy(path, folder)
    found = lm_eval(run_folder / "model", tasks, folder, tmp_path / "out")
    ours = summary["stages"]["compressed"]["tasks"]
    assert set(ours) == set(found) == set(tasks)
    for task in tasks:
        for metric, value in ours[task].items():
            # Only a bootstrapped error depends on the number of its samples.
            tolerance = 1e-5 if not metric.endswith("_stderr") else 1e-4
            assert found[task][metric] == pytest.approx(value, rel=tolerance), (task, metric)
    assert ours != summary["stages"]["original"]["tasks"], "another model has other numbers"


def test_lm_eval_itself_gives_the_runs_numbers(base: Path, stock: dict[str, Any], tmp_path: Path) -> None:
    same_numbers(base, base / "stock" / "run", stock, tmp_path, lm_eval_function)


@pytest.mark.slow
def test_lm_evals_own_command_gives_the_runs_numbers(base: Path, stock: dict[str, Any], tmp_path: Path) -> None:
    same_numbers(base, base / "stock" / "run", stock, tmp_path)


@pytest.mark.slow
def test_lm_evals_own_command_runs_a_bundled_export(base: Path, tmp_path: Path) -> None:
    found = run(base, tmp_path / "bundled", "token")
    assert found["artifacts"]["export_format"] == "bundled"
    same_numbers(base, tmp_path / "bundled" / "run", found, tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_stage_is_measured_with_the_same_experts(
    base: Path, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a training in mixed precision, which computes fused experts another way."""
    seen: dict[str, set[str]] = {}
    trained: set[str] = set()
    evaluate, profile, step = Evaluator._evaluate, measure.profile, RecoveryModule.training_step

    def watched_evaluate(self: Evaluator, model: Any, name: str, *rest: Any) -> Any:
        seen.setdefault(name, set()).add(model.config._experts_implementation)
        return evaluate(self, model, name, *rest)

    def watched_profile(model: Any, name: str, *rest: Any) -> Any:
        seen.setdefault(name, set()).add(model.config._experts_implementation)
        return profile(model, name, *rest)

    def watched_step(self: RecoveryModule, batch: Any, index: int) -> Any:
        trained.add(self.model.config._experts_implementation)
        return step(self, batch, index)

    monkeypatch.setattr(Evaluator, "_evaluate", watched_evaluate)
    monkeypatch.setattr(measure, "profile", watched_profile)
    monkeypatch.setattr(RecoveryModule, "training_step", watched_step)
    settings = config(base / "model", text_files(base / "texts"), tmp_path, steps=2, control=True)
    settings = replace(settings, model=replace(settings.model, dtype=dtype))
    with one_command():
        pipeline.run(settings, [SaliencyPruning("frequency", "uniform", budget=Budget(removed_expert_ratio=0.5))])
    assert trained == {"eager" if dtype == "bfloat16" else "grouped_mm"}
    assert seen == {name: {"grouped_mm"} for name in ("original", "compressed", "recovered", "control")}
