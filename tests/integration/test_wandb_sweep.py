"""What a sweep logs to W&B, read from its offline files record by record: two methods at two budgets."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from support.forks import Forks
from support.runs import ROOT, arguments, model_folder, text_files
from support.wandb_records import OfflineRun, offline_runs

STEPS = 20
FIGURES = (
    "weights_bytes", "memory_ratio", "peak_memory_bytes", "prefill_tokens_per_second", "decode_tokens_per_second",
    "compressed_perplexity", "recovered_perplexity", "compressed_task_mean", "recovered_task_mean", "recover_seconds",
)  # fmt: skip


class Sweep:
    """A finished sweep: its folder, and the offline runs of W&B of its jobs and of its comparison."""

    def __init__(self, base: Path, forks: Forks) -> None:
        model, texts = model_folder(base / "model"), text_files(base / "texts")
        more = (
            "run_dir=null", "logger.wandb.mode=offline", "logger.wandb.tags=[night]", "recovery=distill",
            f"recovery.steps={STEPS}", "recovery.checkpoint_every=20", "evaluation.tasks=[heldout_next_line]",
            "evaluation.heldout.num_questions=4", "evaluation.heldout.num_choices=2", "evaluation.every_n_steps=8",
            "export.enabled=false", "method=reap,frequency", "method.memory_ratio=0.95,0.85", "-m",
        )  # fmt: skip
        done = forks.run(ROOT / "train.py", *arguments(model, texts, base, "unused", *more), folder=base)
        assert done.returncode == 0, done.stderr[-3000:]
        self.stdout = done.stdout
        [self.folder] = {path.parent for path in base.rglob("comparison.json")}
        self.rows = json.loads((self.folder / "comparison.json").read_text())
        self.runs = [offline_runs(base / row["run_folder"] / "logs")[0] for row in self.rows]
        [self.comparison] = offline_runs(self.folder / "logs")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Sweep:
    return Sweep(tmp_path_factory.mktemp("sweep"), forks)


def test_the_runs_of_a_sweep_share_a_group(sweep: Sweep) -> None:
    runs = [*sweep.runs, sweep.comparison]
    assert len(sweep.runs) == 4
    assert {run.run.run_group for run in runs} == {f"default-{sweep.folder.name}"}
    assert {run.run.project for run in runs} == {"recondense"}
    assert [run.run.job_type for run in runs] == [*["compress"] * 4, "comparison"]
    assert len({run.run.run_id for run in runs}) == len({run.run.display_name for run in runs}) == 5
    methods = [row["settings"]["method"] for row in sweep.rows]
    for run, method in zip(sweep.runs, methods, strict=True):
        assert list(run.run.tags) == ["night", "model", method, "distill"]
        assert run.config["method"]["name"] == method
    assert list(sweep.comparison.run.tags) == ["night", "reap", "frequency"]


def test_tasks_are_logged_before_during_and_after_training(sweep: Sweep) -> None:
    for run in sweep.runs:
        scores = run.logged("recovery/heldout_next_line/acc")
        assert list(scores) == [0, 8, 16, STEPS] and all(0 <= score <= 1 for score in scores.values())
        assert run.logged("recovery/heldout_next_line/acc_stderr").keys() == scores.keys()


def test_each_run_logs_how_it_trains(sweep: Sweep) -> None:
    for run in sweep.runs:
        rows = {row["trainer/global_step"]: row for row in run.history if "recovery/learning_rate" in row}
        assert list(rows) == [10, STEPS], "every tenth step, counted like those of the tasks"
        for row in rows.values():
            values = [row[f"recovery/{name}"] for name in ("loss", "kl", "gradient_norm", "tokens_per_second")]
            assert all(isinstance(value, float) and math.isfinite(value) and value > 0 for value in values), row
            assert 1e8 < row["recovery/peak_memory_bytes"] < 1e11
        assert rows[10]["recovery/learning_rate"] > rows[STEPS]["recovery/learning_rate"] > 0, "the schedule"
        assert run.summary["compressed/decode_tokens_per_second"] > 0 and run.exited


def numbers(cells: list[Any]) -> bool:
    return all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells)


def test_the_comparison_table_holds_numbers(sweep: Sweep) -> None:
    table = sweep.comparison.table("comparison/table")
    columns = dict(zip(table["columns"], zip(*table["data"], strict=True), strict=True))
    assert len(table["data"]) == 4
    assert sorted(columns["method.memory_ratio"]) == [0.85, 0.85, 0.95, 0.95]
    assert {*columns["method"]} == {"reap", "frequency"} and {*columns["status"]} == {"done"}
    for name in FIGURES:
        assert numbers([*columns[name]]) and min(columns[name]) >= 0, name
    assert columns["compressed_task_mean"] == columns["compressed_heldout_next_line"]
    types = json.loads(next(sweep.comparison.folder.rglob("*.table.json")).read_text())
    assert types["columns"] == table["columns"]


def test_the_files_of_the_sweep_hold_the_same_numbers(sweep: Sweep) -> None:
    with (sweep.folder / "comparison.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    table = sweep.comparison.table("comparison/table")
    for name in FIGURES:
        expected = sorted(row[table["columns"].index(name)] for row in table["data"])
        assert sorted(float(line[name]) for line in lines) == pytest.approx(expected)
        assert all(isinstance(row[name], int | float) for row in sweep.rows), name
    for line in lines:
        assert float(line["original_decode_tokens_per_second"]) > 0 and float(line["task_mean"]) >= 0
    for words in ("decode", "peak", "task"):
        assert words in sweep.stdout


def test_the_picture_has_a_panel_for_the_speed(sweep: Sweep) -> None:
    height, width = imread(sweep.folder / "comparison.png").shape[:2]
    assert (height, width) == (720, 1650), "two panels"
    assert any("comparison/picture" in key for row in sweep.comparison.history for key in row)


def test_metrics_csv_has_the_same_rows(sweep: Sweep) -> None:
    for row, run in zip(sweep.rows, sweep.runs, strict=True):
        assert isinstance(run, OfflineRun)
        with (sweep.folder.parents[2] / row["run_folder"] / "logs" / "metrics.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        for name in ("learning_rate", "gradient_norm", "tokens_per_second", "peak_memory_bytes"):
            logged = {int(line["step"]): float(line[f"recovery/{name}"]) for line in lines if line[f"recovery/{name}"]}
            assert logged == pytest.approx(run.logged(f"recovery/{name}"))
