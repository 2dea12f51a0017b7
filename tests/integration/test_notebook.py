"""The seven verbs in Python, with the settings of a run, give the numbers of the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import config, model_folder, one_command, text_files

import recondense as rc
from recondense.data.corpora import load_corpora
from recondense.run import pipeline

SETTINGS: dict[str, Any] = {"learning_rate": 1e-2, "batch_size": 2, "checkpoint_every": 2}
FIGURES = ("loss", "perplexity", "kl_to_original")


@pytest.mark.parametrize("method", ["cdmoe", "moei2"])
def test_a_notebook_gives_the_numbers_of_a_run(method: str, tmp_path: Path) -> None:
    """Bit for bit: operations, figures before and after the recovery, and exported weights."""
    paths, folder = text_files(tmp_path / "texts"), model_folder(tmp_path / "model")
    steps: list[Any] = [rc.CDMoE(num_experts=2, num_layers=2)]
    if method == "moei2":
        steps = [rc.InterExpertPruning(prune_ratio=0.34), rc.Decompose(average_rank=4)]
    settings = config(folder, paths, tmp_path / "out", name="distill", objective="distill", steps=6, **SETTINGS)
    settings = replace(settings, evaluation=replace(settings.evaluation, perplexity_windows=None))
    with one_command():
        pipeline.run(settings, steps)
    run = tmp_path / "out" / "run"
    summary = json.loads((run / "summary.json").read_text())
    # The texts of a run: those of the calibration set are not among the training texts.
    corpora = load_corpora(settings.data, ["calibration", "train", "validation"])
    calibration, train, validation = (getattr(corpora, name) for name in ("calibration", "train", "validation"))

    model, tokenizer = rc.load(folder)
    tape = rc.calibrate(model, tokenizer, calibration, num_samples=10, max_length=24)
    plan = rc.search(tape, steps)
    assert plan.operations == rc.Plan.load(run / "plan.json").operations
    student = rc.apply(model, plan, tape)
    compressed = rc.evaluate(student, tokenizer, validation, sequence_length=32)
    assert compressed == {name: summary["stages"]["compressed"][name] for name in FIGURES}
    rc.recover(student, tokenizer, train, objective="distill", steps=6, sequence_length=32, **SETTINGS)
    recovered = rc.evaluate(student, tokenizer, validation, sequence_length=32)
    assert recovered == {name: summary["stages"]["recovered"][name] for name in FIGURES}
    with student.original() as original:
        figures = rc.evaluate(original, tokenizer, validation, sequence_length=32)
    assert figures == {name: summary["stages"]["original"][name] for name in FIGURES[:2]}
    assert rc.export(student, tokenizer, tmp_path / "condensed") == summary["artifacts"]["export_format"]
    exported, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "condensed", run / "model"))
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    reloaded, _ = rc.load(tmp_path / "condensed")
    assert rc.evaluate(reloaded, tokenizer, validation, sequence_length=32)["loss"] == pytest.approx(recovered["loss"])


def test_a_notebook_refuses_bad_settings(tmp_path: Path) -> None:
    model, tokenizer = rc.load(model_folder(tmp_path / "model"))
    texts = ["some words and more words " * 4] * 8
    with pytest.raises(rc.UserError, match="dtype=int4"):
        rc.load(tmp_path / "model", dtype="int4")
    with pytest.raises(rc.UserError, match=r"no such setting\. Did you mean"):
        rc.load(tmp_path / "model", dtyp="float32")
    tape = rc.calibrate(model, tokenizer, texts, num_samples=8, max_length=16)
    with pytest.raises(rc.UserError, match="the model has 6 routed experts"):
        rc.search(tape, rc.CDMoE(num_experts=7))
    student = rc.apply(model, rc.search(tape, rc.CDMoE(num_experts=2, num_layers=1)), tape)
    with pytest.raises(rc.UserError, match="learning_rat"):
        rc.recover(student, tokenizer, texts, learning_rat=1e-3)
    with pytest.raises(rc.UserError, match="teacher=cached"):
        rc.recover(student, tokenizer, texts, sequence_length=16, teacher="cached")
    with pytest.raises(rc.UserError, match=r"summary\.json is missing"):
        rc.compare([tmp_path])
