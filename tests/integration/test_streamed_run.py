"""A complete run of a model that is streamed layer by layer, and the same run with the whole model in memory."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import config, model_folder, one_command, step, text_files

from recondense.evaluation import profiling
from recondense.models.layer_store import layer_store
from recondense.models.streaming import Streamed
from recondense.run import pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed")
    model_folder(folder / "model")
    return folder


def run(base: Path, output: str, streaming: bool, **recovery: Any) -> tuple[Path, dict[str, Any]]:
    """The folder of a run with a cache of its own, and its summary."""
    settings = config(base / "model", text_files(base / "texts"), base / output, **recovery)
    settings = replace(settings, model=replace(settings.model, streaming=streaming))
    with one_command():
        pipeline.run(settings, [step()])
    folder = base / output / "run"
    return folder, json.loads((folder / "summary.json").read_text())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def test_a_streamed_run_decides_measures_and_exports_the_same(base: Path) -> None:
    results = []
    for name, streaming in (("in-memory", False), ("streamed", True)):
        folder, summary = run(base, name, streaming, name="none", objective="none")
        quality = {stage: values["perplexity"] for stage, values in summary["stages"].items()}
        results.append(((folder / "plan.json").read_text(), quality, tensors(folder / "model"), summary))
    (plan, quality, exported, in_memory), (other_plan, other_quality, other_exported, streamed) = results
    assert plan == other_plan and quality == other_quality and set(quality) == {"original", "compressed"}
    assert exported.keys() == other_exported.keys()
    assert all(torch.equal(exported[name], other_exported[name]) for name in exported)
    assert "memory" not in in_memory
    memory = streamed["memory"]
    # Linux counts pages per thread and adds them up in batches, so the peak may lag a little behind.
    assert 0 < memory["layer_bytes"] < memory["before_bytes"] <= memory["peak_resident_bytes"] + 2**20


def test_a_streamed_run_recovers_locally_without_loading_the_model(base: Path) -> None:
    """The same export, and the same figures of every layer, as of a run with the whole model in memory."""
    results = []
    local = {"name": "local", "objective": "local", "steps": 4}
    for name, streaming in (("local-in-memory", False), ("local-streamed", True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Streamed, "load_all", None)
            folder, summary = run(base, name, streaming, **local)
        results.append((tensors(folder / "model"), summary))
        assert (folder / "checkpoints" / "layer-001.ckpt").exists()
        with (folder / "logs" / "metrics.csv").open(newline="") as file:
            logged = {name for row in csv.DictReader(file) for name, value in row.items() if value}
        assert {"recovery/1/loss", "recovery/1/error_before", "recovery/1/error_after"} <= logged
    (exported, in_memory), (other_exported, streamed) = results
    assert exported.keys() == other_exported.keys()
    assert all(torch.equal(exported[name], other_exported[name]) for name in exported)
    assert in_memory["stages"]["recovered"]["perplexity"] == streamed["stages"]["recovered"]["perplexity"]
    assert streamed["stages"]["recovered"]["kl_to_original"] < streamed["stages"]["compressed"]["kl_to_original"]
    [stage], [other] = in_memory["recovery_stages"], streamed["recovery_stages"]
    assert stage["layers"] == other["layers"] and list(stage["layers"]) == ["1", "2"]
    assert all(0 < error["error_after"] < error["error_before"] < 1.5 for error in stage["layers"].values())
    assert streamed["memory"]["training_bytes"] > 0


@pytest.mark.parametrize(
    "recovery",
    [
        {"name": "finetune", "objective": "finetune", "steps": 1},
        {"objective": "distill", "teacher": "cached", "steps": 1},
        {
            **{"objective": "distill", "teacher": "cached", "steps": 1},
            "stages": [{"name": "first", "objective": "local"}, {"name": "second"}],
        },
    ],
    ids=["finetune", "cached", "local, then cached"],
)
def test_peak_memory_is_measured_before_a_recovery_loads_the_model(
    recovery: dict[str, Any], base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And after the teacher's predictions, which are streamed too."""
    was_streamed: list[bool] = []
    models: list[Any] = []
    load_model = pipeline.load_model

    def load(*args: Any) -> Any:
        models.append(load_model(*args))
        return models[-1]

    def peak() -> int:
        if models:
            was_streamed.append(layer_store(models[0]).streamed)
        return 12345 if models else 1234

    monkeypatch.setattr(pipeline, "load_model", load)
    monkeypatch.setattr(profiling, "peak_resident_bytes", peak)
    _, summary = run(base, f"{recovery['objective']}-{'stages' in recovery}", True, **recovery)
    assert was_streamed == [True] and not layer_store(models[0]).streamed
    assert summary["memory"]["peak_resident_bytes"] == 12345 and summary["memory"]["before_bytes"] == 1234
    assert "recovered" in summary["stages"]
    assert capsys.readouterr().err.count("peak memory 12") == 1
