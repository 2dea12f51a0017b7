"""Evaluation of a run and of its exported folder: by the run, by train.py on the folder, and by lm-eval's command."""

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
from support.published_models import model_named
from support.runs import NORMALISED, config, model_folder, one_command, paper_tasks, text_files

from recondense.config.schema import EvaluationConfig, HeldoutConfig
from recondense.evaluation.heldout_tasks import HELDOUT_TASKS
from recondense.methods.cdmoe import CDMoE
from recondense.methods.saliency import SaliencyPruning
from recondense.methods.search.budget import Budget
from recondense.recovery.module import RecoveryModule
from recondense.report import published
from recondense.report.published import CDMOE, DEEPSEEK, PAPER_TASKS
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
    """Condense two of three layers, and run the paper's tasks and the held-out ones before and after; the summary."""
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
    summary = run(base, base / "stock", "mean")
    assert summary["artifacts"]["export_format"] == "stock"
    return summary


def test_every_stage_has_the_mean_of_its_tasks(stock: dict[str, Any]) -> None:
    assert list(stock["stages"]) == ["original", "compressed"]
    for stage in stock["stages"].values():
        scores = [stage["tasks"][task]["acc_norm" if task in NORMALISED else "acc"] for task in PAPER_TASKS[CDMOE]]
        assert stage["task_mean"] == {CDMOE: pytest.approx(sum(scores) / 8)}
    assert stock["published"] == {"rows": []}


def evaluate_folder(command: Command, model: Path, output: Path, *arguments: str) -> dict[str, Any]:
    """Evaluate a folder with train.py and without any texts; return the summary."""
    with one_command():
        code, err = command(
            "method=none", "recovery=none", f"model.path={model}", f"output_dir={output}", f"run_dir={output / 'run'}",
            "data=texts", "callbacks.profile.enabled=false", "logger.wandb.mode=disabled", *arguments,
        )  # fmt: skip
    assert code == 0, err
    assert "calibrating" not in err and ("exporting" in err) == ("export.enabled=true" in arguments)
    summary = json.loads((output / "run" / "summary.json").read_text())
    assert list(summary["stages"]) == ["original"] and "perplexity" not in summary["stages"]["original"]
    assert summary["ratios"] == {} and set(summary["parameters"]["total"]) == {"original"}
    return summary


def test_evaluation_of_a_folder(stock: dict[str, Any], base: Path, command: Command, tmp_path: Path) -> None:
    """The exported folder has the numbers of the run; nothing is calibrated, trained, compared or exported."""
    model = base / "stock" / "run" / "model"
    summary = evaluate_folder(
        command, model, tmp_path, "evaluation=paper_cdmoe", f"evaluation.include_path={base / 'tasks'}"
    )
    compressed = stock["stages"]["compressed"]
    for task in PAPER_TASKS[CDMOE]:
        assert summary["stages"]["original"]["tasks"][task] == pytest.approx(compressed["tasks"][task], abs=1e-6), task
    assert summary["stages"]["original"]["task_mean"] == pytest.approx(compressed["task_mean"])
    assert summary["model"] == str(model)
    assert not (tmp_path / "run" / "model").exists() and summary["artifacts"] == {}
    exported = evaluate_folder(command, model, tmp_path / "exported", "evaluation=none", "export.enabled=true")
    assert exported["artifacts"] == {"model": "model", "export_format": "stock"}


def test_a_folder_without_moe_layers_is_evaluated_on_local_tasks(
    base: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all layers condensed, the config is that of a dense model. Every task of the folder is run."""
    settings = config(base / "model", text_files(base / "texts"), tmp_path / "first", name="none", objective="none")
    with one_command():
        pipeline.run(settings, [CDMoE(2, "all")])
    capsys.readouterr()  # discards the output of the first run
    arguments = ("evaluation=local", f"evaluation.include_path={base / 'tasks'}")
    summary = evaluate_folder(command, tmp_path / "first" / "run" / "model", tmp_path / "second", *arguments)
    assert set(summary["stages"]["original"]["tasks"]) == set(PAPER_TASKS[CDMOE])


def test_published_rows_of_a_known_model(
    base: Path, stock: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With these numbers, the small model passes for DeepSeekMoE-16B, and its plan for one of the paper's."""
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
    table = run(base, tmp_path, "mean")["published"]
    assert table["model"] == DEEPSEEK
    assert [row["mean"] for row in table["rows"]] == [61.6, 59.2], "E(2+0) at three layers is nearest to E(2+2) at two"
    assert [row["same"] for row in table["rows"]] == [True, False]


def lm_eval_command(model: Path, tasks: list[str], folder: Path, output: Path) -> dict[str, dict[str, float]]:
    """The scores of a folder by lm-eval's command line, in another process."""
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
    scores = json.loads(path.read_text())["results"]
    return {
        task: {key.removesuffix(",none"): value for key, value in metrics.items() if key.endswith(",none")}
        for task, metrics in scores.items()
    }


def lm_eval_function(model: Path, tasks: list[str], folder: Path, output: Path) -> dict[str, dict[str, float]]:
    """The scores by the function behind that command, with an index of these tasks alone: lm-eval has 14,000."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    scores = simple_evaluate(
        "hf", model_args=f"pretrained={model}", tasks=tasks, device="cpu", batch_size=8,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )["results"]  # fmt: skip
    return {
        task: {key.removesuffix(",none"): value for key, value in metrics.items() if key.endswith(",none")}
        for task, metrics in scores.items()
    }


def assert_same_scores(
    base: Path, run_folder: Path, summary: dict[str, Any], tmp_path: Path, lm_eval: LmEval = lm_eval_command
) -> None:
    tasks = [*PAPER_TASKS[CDMOE], *HELDOUT_TASKS]
    folder = tmp_path / "tasks"  # lm-eval's command takes one folder
    shutil.copytree(base / "tasks", folder)
    [heldout] = (run_folder.parent / "cache" / "tasks").iterdir()
    for path in heldout.glob("*.yaml"):
        shutil.copy(path, folder)
    scores = lm_eval(run_folder / "model", tasks, folder, tmp_path / "out")
    ours = summary["stages"]["compressed"]["tasks"]
    assert set(ours) == set(scores) == set(tasks)
    for task in tasks:
        for metric, value in ours[task].items():
            # Standard errors are bootstrapped, so they depend on the number of samples.
            tolerance = 1e-5 if not metric.endswith("_stderr") else 1e-4
            assert scores[task][metric] == pytest.approx(value, rel=tolerance), (task, metric)
    assert ours != summary["stages"]["original"]["tasks"], "another model has other numbers"


def test_lm_eval_gives_the_scores_of_the_run(base: Path, stock: dict[str, Any], tmp_path: Path) -> None:
    assert_same_scores(base, base / "stock" / "run", stock, tmp_path, lm_eval_function)


@pytest.mark.slow
def test_the_command_of_lm_eval_gives_the_scores_of_the_run(base: Path, stock: dict[str, Any], tmp_path: Path) -> None:
    assert_same_scores(base, base / "stock" / "run", stock, tmp_path)


@pytest.mark.slow
def test_the_command_of_lm_eval_runs_a_bundled_export(base: Path, tmp_path: Path) -> None:
    summary = run(base, tmp_path / "bundled", "token")
    assert summary["artifacts"]["export_format"] == "bundled"
    assert_same_scores(base, tmp_path / "bundled" / "run", summary, tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_stage_is_measured_with_the_same_experts(
    base: Path, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after training in mixed precision, which uses another implementation of fused experts."""
    implementations: dict[str, set[str]] = {}
    training_implementations: set[str] = set()
    evaluate, profile, step = Evaluator._evaluate, measure.profile, RecoveryModule.training_step

    def noting_evaluate(self: Evaluator, model: Any, name: str, *rest: Any) -> Any:
        implementations.setdefault(name, set()).add(model.config._experts_implementation)
        return evaluate(self, model, name, *rest)

    def noting_profile(model: Any, name: str, *rest: Any) -> Any:
        implementations.setdefault(name, set()).add(model.config._experts_implementation)
        return profile(model, name, *rest)

    def noting_step(self: RecoveryModule, batch: Any, index: int) -> Any:
        training_implementations.add(self.model.config._experts_implementation)
        return step(self, batch, index)

    monkeypatch.setattr(Evaluator, "_evaluate", noting_evaluate)
    monkeypatch.setattr(measure, "profile", noting_profile)
    monkeypatch.setattr(RecoveryModule, "training_step", noting_step)
    settings = config(base / "model", text_files(base / "texts"), tmp_path, steps=2, control=True)
    settings = replace(settings, model=replace(settings.model, dtype=dtype))
    with one_command():
        pipeline.run(settings, [SaliencyPruning("frequency", "uniform", budget=Budget(removed_expert_ratio=0.5))])
    assert training_implementations == {"grouped_mm_autocast" if dtype == "bfloat16" else "grouped_mm"}
    assert implementations == {name: {"grouped_mm"} for name in ("original", "compressed", "recovered", "control")}
