"""The comparison of a sweep: in a real Hydra multirun, and for rows that lack things."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf

from callbacks.sweep import SweepComparison, comparison_rows, swept_settings, write_comparison

APPLICATION = """
import json
from pathlib import Path
import hydra
from omegaconf import OmegaConf
from recondense import config as schema
from recondense.command_line import JobFailed
from recondense.plan import write_aside

@hydra.main(version_base="1.3", config_path=".", config_name="application")
def job(settings):
    config = schema.from_dict(OmegaConf.to_container(settings, resolve=True))
    if config.seed == 3:
        raise RuntimeError("boom")
    if config.seed == 4:
        raise JobFailed(["too little text.", "no room."])
    profile = {"weights_bytes": 1000 * config.seed}
    summary = {"method": "cdmoe", "stages": {"compressed": {"perplexity": 9.0 / config.seed, "profile": profile}}}
    write_aside(config.run_folder() / "summary.json", json.dumps(summary))

job()
"""
CONFIG = """
output_dir: out
seed: 0
hydra:
  sweep: {dir: sweep, subdir: .}
  output_subdir: null
  callbacks: {comparison: {_target_: callbacks.sweep.SweepComparison}}
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "application.yaml").write_text(CONFIG)
    (folder / "application.py").write_text(APPLICATION)
    return subprocess.run(
        [sys.executable, "application.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_multirun_is_compared_failures_included(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "seed=1,2,3", "+experiment_name=test")
    folder = tmp_path / "sweep"
    rows = json.loads((folder / "comparison.json").read_text())
    assert [row["settings"] for row in rows] == [{"seed": "1"}, {"seed": "2"}, {"seed": "3"}]
    assert [row["status"] for row in rows] == ["done", "done", "failed: RuntimeError: boom"]
    assert [row.get("compressed_perplexity") for row in rows] == [9.0, 4.5, None]
    assert all(Path(tmp_path, row["run_folder"]).parent.name == "test" for row in rows)
    with (folder / "comparison.csv").open(newline="") as file:
        assert [row["weights_bytes"] for row in csv.DictReader(file)] == ["1000", "2000", ""]
    assert (folder / "comparison.png").stat().st_size > 10_000
    for expected in ("comparison", "4.50", "failed:", "sweep"):
        assert expected in done.stdout
    assert "UserWarning" not in done.stderr


def test_what_the_user_can_mend_is_listed_and_ends_with_2(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "seed=1,4,2")
    rows = json.loads((tmp_path / "sweep" / "comparison.json").read_text())
    assert [row["status"] for row in rows] == ["done", "failed: too little text. no room.", "done"]
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "Error executing" not in done.stderr
    assert done.stderr.splitlines()[-3:] == [
        "recondense: 2 problems",
        " 1. seed=4: too little text.",
        " 2. seed=4: no room.",
    ]
    assert not (tmp_path / "sweep" / ".jobs").exists()


def test_a_single_run_is_no_sweep(tmp_path: Path) -> None:
    mode = OmegaConf.create({"hydra": {"mode": RunMode.RUN, "sweep": {"dir": str(tmp_path / "sweep")}}})
    SweepComparison().on_job_end(mode, JobReturn())
    assert not list(tmp_path.iterdir())


def test_nothing_but_the_comparison_stays(tmp_path: Path) -> None:
    config = OmegaConf.create(
        {"hydra": {"mode": RunMode.MULTIRUN, "sweep": {"dir": str(tmp_path / "sweep")}, "job": {"num": 0}}}
    )
    callback = SweepComparison()
    callback.on_multirun_start(config)
    callback.on_multirun_end(config)
    assert not (tmp_path / "sweep").exists()  # no job, no comparison
    done = JobReturn(overrides=["seed=1"], cfg=OmegaConf.create({"seed": 1}), status=JobStatus.COMPLETED)
    callback.on_job_end(config, done)
    callback.on_multirun_end(config)
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["comparison.csv", "comparison.json"]


def test_only_what_differs_is_a_setting() -> None:
    jobs = [["method.num_layers=2", "recovery=none"], ["method.num_layers=4", "recovery=none"]]
    assert swept_settings(jobs) == [{"method.num_layers": "2"}, {"method.num_layers": "4"}]
    assert swept_settings([["a=1", "+b=x=y"]]) == [{"a": "1", "b": "x=y"}]
    assert swept_settings([["a=1"], []]) == [{"a": "1"}, {}]
    assert swept_settings([]) == []


def record(folder: Path, status: str = "done") -> dict[str, Any]:
    return {"number": 0, "overrides": ["seed=1"], "run_folder": str(folder), "status": status}


def test_runs_without_a_summary_are_failed(tmp_path: Path) -> None:
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "summary.json").write_text('{"stages": ')
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.json").write_text('{"method": "cdmoe"}')
    rows = comparison_rows(
        [record(tmp_path / "missing"), record(tmp_path / "torn"), record(tmp_path / "old", "failed: ValueError: no")]
    )
    assert [row["status"] for row in rows] == ["failed: no summary"] * 2 + ["failed: ValueError: no"]
    assert "method" not in rows[2]


def test_without_perplexity_there_is_no_picture(tmp_path: Path) -> None:
    rows = [{"settings": {"seed": "1"}, "status": "done", "run_folder": "x", "memory_ratio": 0.5}]
    write_comparison(rows, tmp_path / "sweep")
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["comparison.csv", "comparison.json"]
