"""A run of a model with a super expert: where it is reported, and that runs share what they find."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import config, model_folder, text_files
from support.super_expert import CHANNEL, LAYER
from support.tiny_models import qwen2_moe

from recondense.methods.mone import MoNE
from recondense.methods.saliency import SaliencyPruning
from recondense.methods.search.budget import Budget
from recondense.models import moe_blocks
from recondense.plan import Plan
from recondense.run import pipeline, super_experts

EXPERT = 2


def model(**changes: Any) -> Any:
    planted = qwen2_moe(**changes)
    with torch.no_grad():
        moe_blocks.sparse_blocks(planted)[LAYER].weights.down_EDF[EXPERT, CHANNEL] *= 1e6
    return planted


def test_runs_find_it_once_and_report_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run, with another method, reads it from the cache. The third ignores it and is told what it loses."""
    folder, texts = model_folder(tmp_path / "model", model), text_files(tmp_path / "texts")
    times: list[int] = []
    find = super_experts.find_super_experts
    monkeypatch.setattr(super_experts, "find_super_experts", lambda *args: times.append(1) or find(*args))  # type: ignore[func-returns-value]
    runs: list[tuple[Any, bool]] = [
        (SaliencyPruning("random", budget=Budget(removed_expert_ratio=0.34)), True),
        (MoNE(Budget(removed_expert_ratio=0.6)), True),
        (SaliencyPruning("random", budget=Budget(removed_expert_ratio=0.66), seed=1), False),
    ]
    for number, (step, protects) in enumerate(runs):
        settings = config(folder, texts, tmp_path / str(number), name="none", objective="none")
        method = {**settings.method, "protect_super_experts": protects}
        settings = replace(settings, method=method, cache_dir=str(tmp_path / "cache"))
        pipeline.run(settings, [step])
        report = capsys.readouterr()
        run = tmp_path / str(number) / "run"
        summary = json.loads((run / "summary.json").read_text())
        record = Plan.load(run / "plan.json").search["super_experts"]
        assert summary["super_experts"] == record and list(record["largest_outputs"]) == [str(LAYER)]
        assert list(record["largest_outputs"][str(LAYER)]) == [str(EXPERT)]
        lost = {} if protects else {"prune": {str(LAYER): [EXPERT]}}
        assert record["lost"] == lost
        words = ", all kept" if protects else f"; LOST: layer {LAYER}: {EXPERT} (prune)"
        assert f"super experts: layer {LAYER}: {EXPERT}{words}" in report.out
    assert times == [1]
    loaded: Any = json.loads((tmp_path / "1" / "run" / "model" / "config.json").read_text())
    assert loaded["compressed_layers"][str(LAYER)]["constants"] >= 1
