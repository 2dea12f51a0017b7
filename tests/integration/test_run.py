"""Complete runs: their folder, summary and export, the same command again, and a sweep by the real command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forks import Forks
from support.runs import ROOT, config, model_folder, step, text_files
from transformers import AutoModelForCausalLM

from recondense.plan import Plan
from recondense.run import pipeline
from recondense.surgery import execute

LOAD = """
import sys
sys.modules["recondense"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.load(sys.argv[2])
torch.save(model(ids).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model_folder(folder / "model")
    text_files(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def finished(base: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the summary of a run with every stage."""
    settings = config(base / "model", text_files(base / "texts"), base / "out", control=True, steps=12)
    metric = pipeline.run(settings, [step()])
    folder = base / "out" / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert metric == summary["stages"]["recovered"]["perplexity"]
    return folder, summary


def test_the_summary_and_the_folder_are_complete(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    assert summary["schema"] == 1
    assert list(summary["stages"]) == ["original", "compressed", "recovered", "control"]
    assert set(summary["environment"]["data"]) == {"train", "validation", "calibration"}
    seconds = {"calibrate", "search", "apply", "evaluate", "profile", "recover", "control", "export"}
    assert set(summary["seconds"]) == seconds, "without a refit"
    stages, ratios = summary["stages"], summary["ratios"]
    loss_increase = stages["compressed"]["loss"] - stages["original"]["loss"]
    assert ratios["gap_closed"] == pytest.approx(
        (stages["compressed"]["loss"] - stages["recovered"]["loss"]) / loss_increase
    )
    assert stages["recovered"]["kl_to_original"] < stages["compressed"]["kl_to_original"]
    # Two of three layers retain two of six experts.
    assert ratios["routed_expert_parameters"] == pytest.approx((2 * 2 + 6) / 18)
    assert ratios["memory"] == (
        stages["compressed"]["profile"]["weights_bytes"] / stages["original"]["profile"]["weights_bytes"]
    )
    for name in ("config.yaml", "plan.json", "plan.png", "logs/metrics.csv", "checkpoints/final.ckpt"):
        assert (folder / name).exists(), name
    assert len(Plan.load(folder / "plan.json").operations) == 2


@torch.no_grad()
def test_export_is_the_student_and_loads_without_recondense(
    finished: tuple[Path, dict[str, Any]], base: Path, tmp_path: Path
) -> None:
    """The student is made again from the original, the plan and the final checkpoint of the run."""
    folder, summary = finished
    assert summary["artifacts"]["export_format"] == "stock"
    ids = torch.arange(1, 21).reshape(2, 10)
    torch.save(ids, tmp_path / "io.pt")
    subprocess.run([sys.executable, "-c", LOAD, str(folder / "model"), str(tmp_path / "io.pt")], check=True)
    exported = torch.load(tmp_path / "io.pt")

    student = AutoModelForCausalLM.from_pretrained(base / "model").eval()
    original = student(ids).logits
    num_parameters = student.num_parameters()
    execute.execute(student, Plan.load(folder / "plan.json"))
    condensed = student(ids).logits
    state = torch.load(folder / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]
    assert state and all(name.startswith("model.") for name in state)
    loaded = student.load_state_dict(
        {name.removeprefix("model."): value for name, value in state.items()}, strict=False
    )
    assert loaded.unexpected_keys == []

    torch.testing.assert_close(exported, student(ids).logits, rtol=0, atol=1e-4)
    for other in (original, condensed):  # so that other logits would be noticed
        assert (exported - other).abs().max() > 1e-2
    assert student.num_parameters() < num_parameters


def test_the_same_command_again_reports_that_all_is_done(
    finished: tuple[Path, dict[str, Any]], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, summary = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    settings = config(base / "model", text_files(base / "texts"), base / "out", control=True, steps=12)
    assert pipeline.run(settings, [step()]) == summary["stages"]["recovered"]["perplexity"]
    assert "all done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


def test_method_none_trains_the_original_further(base: Path) -> None:
    texts = text_files(base / "texts")
    settings = config(base / "model", texts, base / "none", objective="finetune", name="finetune", steps=12)
    pipeline.run(settings, [])
    stages = json.loads((base / "none" / "run" / "summary.json").read_text())["stages"]
    assert list(stages) == ["original", "recovered"]
    assert stages["recovered"]["loss"] < stages["original"]["loss"]


def test_sweep_searches_once(forks: Forks, base: Path) -> None:
    texts = text_files(base / "texts")
    out = base / "sweep"
    arguments = [
        "-m", "method.num_layers=1,3", "method.num_experts=2", f"model.path={base / 'model'}", "recovery=none",
        "data=texts", "data.sequence_length=32", "data.calibration.num_samples=10", "data.calibration.max_length=24",
        *(f"data.{split}.path={path}" for split, path in texts.items()),
        "evaluation.tasks=[]", "callbacks.profile.enabled=false", "logger.wandb.mode=disabled", f"output_dir={out}",
    ]  # fmt: skip
    done = forks.run(ROOT / "train.py", *arguments, folder=base)
    assert done.returncode == 0, done.stderr
    assert "reused 3 of 3 expert orders and 1 of 3 layers of the layer order" in done.stderr
    again = forks.run(ROOT / "train.py", *arguments, "overwrite=true", folder=base)
    assert again.returncode == 0, again.stderr
    assert "reused 3 of 3 expert orders and 3 of 3 layers of the layer order" in again.stderr
    assert "calibrating" not in again.stderr
    folder = next((out / "default" / "sweeps").iterdir())
    rows = json.loads((folder / "comparison.json").read_text())
    assert len(rows) == 2
    assert (folder / "comparison.png").exists()
