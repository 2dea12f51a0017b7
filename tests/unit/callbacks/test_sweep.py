"""The comparison of a sweep: in a real Hydra multirun, and for rows that lack values."""

import csv
import io
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from matplotlib.image import imread
from omegaconf import OmegaConf
from rich.console import Console
from support.forks import Forks
from support.wandb_records import offline_runs

from recondense.callbacks.sweep import SweepComparison, comparison_rows, log_sweep, swept_settings, write_comparison
from recondense.report import tracking
from recondense.report.comparison import by_seed, caption, comparison_markdown, comparison_table
from recondense.report.sweep_picture import draw_comparison

APPLICATION = """
import json
from pathlib import Path
import hydra
from omegaconf import OmegaConf
from recondense.config import schema
from recondense.run.exit_codes import JobFailed
from recondense.files import write_aside

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
  callbacks: {comparison: {_target_: recondense.callbacks.sweep.SweepComparison}}
"""


def run(forks: Forks, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "application.yaml").write_text(CONFIG)
    (folder / "application.py").write_text(APPLICATION)
    return forks.run(folder / "application.py", *arguments, folder=folder)


def test_a_multirun_is_compared_failures_included(forks: Forks, tmp_path: Path) -> None:
    done = run(forks, tmp_path, "-m", "seed=1,2,3", "+experiment_name=test")
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


def test_what_the_user_can_fix_is_listed_and_exits_with_2(forks: Forks, tmp_path: Path) -> None:
    done = run(forks, tmp_path, "-m", "seed=1,4,2")
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


def test_only_the_comparison_is_kept(tmp_path: Path) -> None:
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
    def shown(*jobs: list[str], given: Sequence[str] = ()) -> list[dict[str, str]]:
        records = [{"overrides": job, "run_folder": f"out/{number}"} for number, job in enumerate(jobs)]
        return swept_settings(records, given)

    layers = [{"method.num_layers": "2"}, {"method.num_layers": "4"}]
    assert shown(["method.num_layers=2", "recovery=none"], ["method.num_layers=4", "recovery=none"]) == layers
    assert shown(["a=1"], []) == [{"a": "1"}, {}]
    assert shown() == []
    assert shown(["a=1", "+b=x=y"], given=["b"]) == [{"b": "x=y"}], "one job"
    assert shown(["a=1", "c=2"], ["a=1", "c=2"], given=["a"]) == [{"a": "1"}, {"a": "1"}], "-m a=1,1 c=2"
    assert shown(["a=1", "b=2"]) == [{"run": "0"}]
    assert shown(["a=1"], ["a=1"]) == [{"run": "0"}, {"run": "1"}]


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


def seeded(method: str, ratio: str, seed: int, **figures: Any) -> dict[str, Any]:
    settings = {"method": method, "method.memory_ratio": ratio, "seed": str(seed)}
    folder = f"out/{method}/{seed}" if method == "none" else f"out/{method}/{ratio}/{seed}"
    return {"settings": settings, "status": "done", "run_folder": folder, "method": method, **figures}


def comparison() -> list[dict[str, Any]]:
    """Two methods, the control and one method that fails; two budgets, two seeds."""
    rows = []
    for ratio, scale in (("0.5", 10.0), ("0.7", 1.0)):
        for seed in (0, 1):
            size = {"memory_ratio": float(ratio), "weights_bytes": 1e6 * float(ratio), "original_perplexity": 8.0}
            for method, first in (("reap", 12.0), ("cdmoe", 9.0)):
                after = 8 + (first - 8 + 2 * seed) * scale
                size |= {"compressed_perplexity": 30.0 * scale, "recovered_perplexity": after}
                size |= {"original_task": 0.59, "original_task_error": 0.049, "recovered_task": 0.603 + 0.01 * seed}
                seconds = {"search_seconds": 40.0 - 39 * seed, "refit_seconds": 7.0, "recover_seconds": 3.0 + seed}
                rows.append(seeded(method, ratio, seed, seconds=99.0, gap_closed=0.5, **seconds, **size))
            rows.append(seeded("none", ratio, seed, original_perplexity=8.0, recovered_perplexity=7.0 + seed))
            failed = seeded("block_drop", ratio, seed, **(size if ratio == "0.7" else {}))
            rows.append(failed if ratio == "0.7" else {**failed, "status": "failed: no layer | is small enough"})
    return rows


def test_seeds_become_mean_and_deviation() -> None:
    entries = {
        (entry["method"], entry["settings"].get("method.memory_ratio")): entry for entry in by_seed(comparison())
    }
    assert len(entries) == 7
    assert entries["reap", "0.7"]["recovered_perplexity"] == pytest.approx((13.0, 2**0.5))
    assert entries["cdmoe", "0.5"]["recovered_perplexity"] == pytest.approx((28.0, 200**0.5))
    assert entries["cdmoe", "0.5"]["recover_seconds"] == pytest.approx((3.5, 0.5**0.5))
    assert entries["cdmoe", "0.5"]["search_seconds"] == (40.0, None), "the other seed read the cache"
    assert "seconds" not in entries["cdmoe", "0.5"], "they include evaluation"
    assert entries["reap", "0.5"]["compressed_perplexity"] == (300.0, 0.0)
    assert entries["reap", "0.5"]["count"] == entries["reap", "0.5"]["jobs"] == 2
    single = by_seed([seeded("reap", "0.5", 0, recovered_perplexity=3.0)])
    assert single[0]["recovered_perplexity"] == (3.0, None) and single[0]["count"] == 1


def test_a_run_counts_once() -> None:
    """Both budgets of method=none are the same two runs, so the budget is not among their settings."""
    [control] = [entry for entry in by_seed(comparison()) if entry["method"] == "none"]
    assert control["settings"] == {"method": "none"} and control["count"] == 2
    assert control["recovered_perplexity"] == pytest.approx((7.5, 0.5**0.5))


def test_largest_budget_first_then_the_best() -> None:
    order = [(entry["method"], entry["settings"].get("method.memory_ratio")) for entry in by_seed(comparison())]
    assert order == [
        *(("none", None), ("cdmoe", "0.7"), ("block_drop", "0.7"), ("reap", "0.7")),
        *(("cdmoe", "0.5"), ("reap", "0.5"), ("block_drop", "0.5")),
    ]
    rows = [{**row, "settings": {**row["settings"], "method.memory_ratio": "null"}} for row in comparison()]
    assert by_seed(rows)[0]["method"] == "none", "without budgets, the measured sizes decide the order"


def test_the_table_of_seeds_and_what_failed(tmp_path: Path) -> None:
    write_comparison(comparison(), tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    lines = text.splitlines()
    assert lines[0] == (
        "| run | n | memory ratio | ppl before | ppl after | all closes | task after | search (s) | recover (s) |"
    )
    assert lines[0].count("|") == lines[1].count("|") == lines[3].count("|")
    assert lines[3] == "| cdmoe, 0.7 | 2 | 0.700 | 30.00 | 10.00 ± 1.41 | 50% | 0.61 ± 0.01 | 40 | 4 ± 1 |"
    assert "| block_drop, 0.5 | 0/2 | - |" in text
    assert "block_drop, 0.5: failed: no layer" in text and "perplexity 8.00" in text
    with (tmp_path / "comparison.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 16, "a row a job"
    assert imread(tmp_path / "comparison.png").shape[:2] == (720, 1485)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(comparison_table(by_seed(comparison())))
    shown = console.export_text()
    assert "±1.41" in shown and "0/2" in shown and "[" not in shown


def test_the_caption_says_which_differences_matter() -> None:
    entries = by_seed([row for row in comparison() if row["method"] != "block_drop"])
    words = "\n".join(caption(entries, without=["n"]))
    assert "2 runs each" in words and "have no deviation" in words
    assert "Original: perplexity 8.00, task 0.590 (standard error 0.049)." in words
    assert "standard error of about 0.05, larger than the deviation over seeds (at most 0.007)" in words
    assert "Differences below 0.14" in words
    assert "below the budget" in words and "is counted once" in words
    assert "Closes is " in words and "Closes is " in comparison_markdown(entries)
    assert "Closes is " not in "\n".join(caption(entries, without=["gap_closed", "refit_gap_closed"])), "no such column"
    steady = [{**entry, "recovered_task": (0.6, 0.07)} for entry in entries]
    assert "larger than" not in "\n".join(caption(steady))
    bare = by_seed([seeded("reap", "0.5", 0, recovered_perplexity=3.0)])
    words = "\n".join(caption(bare, without=["n"]))
    assert "One run each" in words and not any(word in words for word in ("standard error", "Original", "Seconds"))


def test_the_table_of_all_methods_fits_120_columns() -> None:
    figures = {
        "memory_ratio": 0.673, "original_heldout_next_line_error": 0.049, "refit_gap_closed": 0.823, "gap_closed": 0.9,
        **{f"{stage}_perplexity": 121.4 for stage in ("compressed", "refitted", "recovered")},
        **{f"{stage}_heldout_next_line": 0.59 for stage in ("original", "compressed", "refitted", "recovered")},
        **{f"{part}_seconds": 149.0 for part in ("search", "refit", "recover")},
    }  # fmt: skip
    rows = [seeded("routing_weight", ratio, seed, **figures) for ratio in ("0.673", "0.509") for seed in (0, 1, 2)]
    rows[0] = {**rows[0], "status": "failed: no"}  # the longest entry of the column n
    table = comparison_table(by_seed(rows))
    table.caption = None
    assert Console(width=500).measure(table).maximum <= 120


@pytest.mark.parametrize("methods", [("reap",), ("reap", "none")], ids=["alone", "with_control"])
def test_a_comparison_of_one_method_has_its_picture(methods: tuple[str, ...], tmp_path: Path) -> None:
    rows = [row for row in comparison() if row["method"] in methods]
    write_comparison(rows, tmp_path)
    assert imread(tmp_path / "comparison.png").shape[:2] == (720, 1485)


@pytest.mark.parametrize("seeds", [1, 2])
def test_with_speeds_the_picture_has_a_second_axis(seeds: int, tmp_path: Path) -> None:
    rows = [
        {**row, "decode_tokens_per_second": 40.0 + 3 * number, "original_decode_tokens_per_second": 30.0}
        for number, row in enumerate(comparison())
        if "weights_bytes" in row and row["settings"]["seed"] < str(seeds)
    ]
    if seeds == 1:
        rows = [{**row, "settings": {k: v for k, v in row["settings"].items() if k != "seed"}} for row in rows]
    write_comparison(rows, tmp_path)
    height, width = imread(tmp_path / "comparison.png").shape[:2]
    assert (height, width) == ((720, 1650) if seeds == 1 else (1260, 1485))


def test_the_table_on_a_terminal_omits_what_does_not_fit() -> None:
    figures = {
        f"{stage}_{name}": 0.5
        for stage in ("compressed", "recovered")
        for name in ("perplexity", "a", "b", "task_mean")
    }
    speeds = {"peak_memory_bytes": 1e6, "prefill_tokens_per_second": 1e4, "decode_tokens_per_second": 1e3}
    more = {"gap_closed": 0.5, "refit_gap_closed": 0.4, "refitted_perplexity": 3.0, "memory_ratio": 0.5}
    seconds = {f"{part}_seconds": 149.0 for part in ("search", "refit", "recover")}
    rows = [seeded("routing_weight", "0.673", seed, **figures, **speeds, **more, **seconds) for seed in (0, 1)]
    table = comparison_table(by_seed(rows))
    titles = " ".join(str(column.header).replace("\n", " ") for column in table.columns)
    assert "decode tok/s" in titles and "prefill" not in titles
    table.caption = None
    assert Console(width=500).measure(table).maximum <= 120
    assert "decode tok/s" in comparison_markdown(by_seed(rows)) and "prefill tok/s" in comparison_markdown(
        by_seed(rows)
    )


def test_the_control_alone_has_no_picture_of_methods(tmp_path: Path) -> None:
    rows = [row for row in comparison() if row["method"] == "none"]
    assert draw_comparison(by_seed(rows), tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_wandb_gets_the_table_and_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, Any] = {}
    monkeypatch.setattr(tracking.QuietWandbLogger, "log_table", lambda self, key, **table: logged.update({key: table}))
    monkeypatch.setattr(tracking.QuietWandbLogger, "log_image", lambda self, key, files: logged.update({key: files}))
    write_comparison(comparison(), tmp_path)
    wandb = {"mode": "offline", "project": "recondense", "entity": None, "name": None, "tags": []}
    config = {"experiment_name": "compare", "hydra": {"sweep": {"dir": str(tmp_path)}}}
    log_sweep(OmegaConf.create(config), comparison())
    log_sweep(OmegaConf.create({**config, "logger": {"wandb": {**wandb, "mode": "disabled"}}}), comparison())
    assert not logged and not (tmp_path / "logs").exists()
    log_sweep(OmegaConf.create({**config, "logger": {"wandb": wandb}}), comparison())
    assert list(logged) == ["comparison/table", "comparison/picture"]
    assert len(logged["comparison/table"]["data"]) == 7
    assert logged["comparison/picture"] == [str(tmp_path / "comparison.png")]
    [run] = offline_runs(tmp_path / "logs")
    assert run.run.job_type == "comparison" and {*run.run.tags} == {"none", "reap", "cdmoe", "block_drop"}
