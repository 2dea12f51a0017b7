"""Complete runs with predictions on disk, and with another model as the teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from support.checks import run_messages
from support.runs import config, model_folder, one_command, step, text_files
from support.small import byte_tokenizer
from support.tiny_models import qwen2_moe

from recondense.run import pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    model_folder(folder / "model")
    return folder


def run(base: Path, name: str, steps: Sequence[Any] | None = None, **recovery: Any) -> dict[str, Any]:
    settings = config(base / "model", text_files(base / "texts"), base / "output", **{"steps": 3, **recovery})
    folder = base / "output" / name
    with one_command():
        pipeline.run(replace(settings, run_dir=str(folder)), [step()] if steps is None else steps)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def test_predictions_on_disk(base: Path) -> None:
    """They hold the windows that train alone, and runs that differ only in the training share them."""
    settings: dict[str, Any] = {"teacher": "cached", "teacher_top_k": 16}
    stages = run(base, "one", **settings)["stages"]
    assert stages["recovered"]["kl_to_original"] != stages["compressed"]["kl_to_original"]
    assert stages["recovered"]["loss"] != stages["compressed"]["loss"]
    files = list((base / "output" / "cache" / "teacher").rglob("*.safetensors"))
    with safe_open(files[0], framework="pt") as file:
        assert len(files) == 1 and file.get_slice("ids_TK").get_shape() == [6, 32, 16]  # 3 steps of 2 windows
    before = files[0].stat().st_mtime_ns
    run(base, "two", **settings, learning_rate=1e-3)
    assert list((base / "output" / "cache" / "teacher").rglob("*.safetensors")) == files
    assert files[0].stat().st_mtime_ns == before


def test_another_model(base: Path) -> None:
    """Also for a student that is not compressed."""
    other = model_folder(base / "other", lambda **changes: qwen2_moe(seed=3, **changes))
    settings: dict[str, Any] = {"teacher": "model", "teacher_path": str(other)}
    assert "kl_to_original" in run(base, "other", **settings)["stages"]["recovered"]
    run(base, "uncompressed", [], **settings, trainable="all")
    run(base, "itself", [], teacher="cached")
    logged = {
        name: next((base / "output" / name / "logs").rglob("*.csv")).read_text().splitlines()[0]
        for name in ("uncompressed", "itself")
    }
    assert "recovery/kl" in logged["uncompressed"] and "recovery/cross_entropy" not in logged["uncompressed"]
    assert "recovery/cross_entropy" in logged["itself"] and "recovery/kl" not in logged["itself"]


def test_a_teacher_with_another_vocabulary_is_refused_before_anything_is_loaded(base: Path) -> None:
    base_settings = config(base / "model", text_files(base / "texts"), base / "output" / "refused", teacher="model")
    wider = model_folder(base / "wider", lambda **changes: qwen2_moe(**{**changes, "vocab_size": 300}))
    renamed = model_folder(base / "renamed")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(renamed)
    for path, reason in (
        (wider, "has 300 logits, but the student's has 257"),
        (renamed, "'<|extra|>' (teacher's id 257"),
    ):
        settings = replace(base_settings, recovery=replace(base_settings.recovery, teacher_path=str(path)))
        (problem,) = run_messages(settings, [step()])
        assert f"recovery.teacher_path={path}" in problem and reason in problem
    settings = replace(base_settings, recovery=replace(base_settings.recovery, teacher_path=str(base / "model")))
    assert run_messages(settings, [step()]) == []
