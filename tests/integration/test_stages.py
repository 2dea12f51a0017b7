"""Runs of train.py that recover in stages, and on records alone."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import arguments, model_folder, record_file, text_files

Command = Callable[..., tuple[int, str]]
pytestmark = [
    pytest.mark.usefixtures("as_one_command"),
    # Lightning warns about every fit into a folder that is not empty.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    model_folder(folder / "model")
    return folder


def run(command: Command, base: Path, name: str, *more: str) -> tuple[Path, dict[str, Any]]:
    quick = ["method.num_experts=2", "method.num_layers=2", "callbacks.profile.enabled=false", "export.enabled=false"]
    words = arguments(base / "model", text_files(base / "texts"), base, name, "evaluation=none", *quick, *more)
    code, err = command(*words)
    assert code == 0, err
    folder = base / name
    return folder, json.loads((folder / "summary.json").read_text())


def test_the_published_two_stages(command: Command, base: Path) -> None:
    """conf/recovery/two_stage.yaml with local files and few steps; the control has the same stages."""
    data = "recovery.stages.1.data"
    folder, summary = run(
        command, base, "two", "recovery=two_stage", "recovery.control=true", "recovery.stages.0.steps=3",
        "recovery.stages.0.sequence_length=16", "recovery.stages.0.batch_size=2",
        "+recovery.stages.0.validate_every=2", f"{data}.source=texts", f"{data}.form=chat",
        f"{data}.train.path={record_file(base / 'texts')}",
    )  # fmt: skip
    lm, sft = summary["recovery_stages"]
    assert (lm["name"], lm["steps"], lm["learning_rate"], lm["sequence_length"]) == ("lm", 3, 1e-5, 16)
    assert (sft["name"], sft["steps"], sft["learning_rate"], sft["batch_size"]) == ("sft", 2, 5e-5, 16)
    assert (lm["examples"], lm["windows"], lm["left_out"], lm["cut"]) == (8, 8, 0, 8), "one window for each text"
    assert (sft["examples"], sft["windows"], sft["left_out"]) == (21, 21, 0), "also where the answer is cut off"
    assert summary["seconds"]["recover"] >= lm["seconds"] + sft["seconds"] > 0
    finals = {str(path.relative_to(folder / "checkpoints")) for path in folder.rglob("final.ckpt")}
    assert finals == {"0-lm/final.ckpt", "1-sft/final.ckpt", "control/0-lm/final.ckpt", "control/1-sft/final.ckpt"}
    with (folder / "logs" / "metrics.csv").open(newline="") as file:
        logged = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    assert logged >= {"lm/loss", "lm/validation_loss", "sft/loss", "control/lm/loss", "control/sft/loss"}
    assert "recovery/loss" not in logged


def test_records_in_all_three_splits(command: Command, base: Path) -> None:
    """data=instruct: the method calibrates on whole chats, and the recovery learns their answers."""
    path, validation = record_file(base / "texts"), base / "validation.json"
    validation.write_text(json.dumps([{"instruction": "Go.", "output": "So be it."}] * 3))
    folder, summary = run(
        command, base, "instruct", "data=instruct", "data.source=texts", "recovery=finetune",
        f"data.calibration.path={path}", f"data.train.path={path}", f"data.validation.path={validation}",
        "recovery.validate_every=3", "recovery.steps=3", "data.sequence_length=180",
    )  # fmt: skip
    assert (folder / "checkpoints" / "final.ckpt").exists()
    [stage] = summary["recovery_stages"]
    assert (stage["name"], stage["steps"], stage["left_out"]) == ("recovery", 3, 1)
    assert stage["windows"] < stage["examples"] == 10, "ten of the 21 records calibrate"
    assert set(summary["environment"]["data"]) == {"train", "validation", "calibration"}


def test_two_stages_of_adapters_on_a_dropped_layer(command: Command, base: Path) -> None:
    """Both put adapters on weights that the student and its original share."""
    stages = "recovery.stages=[{name: a, steps: 2},{name: b, steps: 2, objective: finetune, validate_every: 1}]"
    settings = arguments(
        base / "model", text_files(base / "texts"), base, "adapters", "method=layer_drop", "recovery=lora", stages,
        "method.removed_expert_ratio=0.3", "callbacks.profile.enabled=false", "export.enabled=false",
        "recovery.objective=distill",
    )  # fmt: skip
    code, err = command(*settings)
    assert code == 0, err
    summary = json.loads((base / "adapters" / "summary.json").read_text())
    assert [stage["name"] for stage in summary["recovery_stages"]] == ["a", "b"]
    assert summary["stages"]["recovered"]["loss"] != summary["stages"]["compressed"]["loss"]
