"""A complete run of an original that is stored in fewer bits than it computes with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.packed import fp8_folder
from support.runs import config, text_files
from support.tiny_models import qwen2_moe

from recondense.config.schema import RecoveryConfig
from recondense.methods.cdmoe import CDMoE
from recondense.run import pipeline


def test_a_run_counts_bytes_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sizes and their ratio come from the files; the printed report and the model card say so."""
    torch.manual_seed(0)
    fp8_folder(
        tmp_path / "fp8",
        qwen2_moe(vocab_size=257, hidden_size=160, moe_intermediate_size=144, max_position_embeddings=256),
    )
    settings = config(tmp_path / "fp8", text_files(tmp_path / "texts"), tmp_path / "out")
    settings = replace(settings, recovery=RecoveryConfig(), model=replace(settings.model, dtype="bfloat16"))
    pipeline.run(settings, [CDMoE(num_experts=1, num_layers=1)])
    folder = tmp_path / "out" / "run"
    summary = json.loads((folder / "summary.json").read_text())
    original, compressed = (
        (model_folder / "model.safetensors").stat().st_size for model_folder in (tmp_path / "fp8", folder / "model")
    )
    assert summary["quantization"] == "fp8"
    assert summary["bytes_on_disk"] == {"original": original, "compressed": compressed}
    assert summary["ratios"]["memory"] == compressed / original
    dequantized = summary["stages"]["original"]["profile"]["weights_bytes"]
    assert dequantized > 1.5 * original, "result stages count the dequantised model"
    for text in (capsys.readouterr().out, (folder / "model" / "README.md").read_text()):
        assert "counted in bytes on disk" in text and "stored in fp8" in text
