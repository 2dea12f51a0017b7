"""What a run keeps on disk as it proceeds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from recondense.run.run_record import RunRecord


def test_a_refit_is_kept_over_restarts(tmp_path: Path) -> None:
    def start() -> RunRecord:
        return RunRecord(tmp_path, {})

    assert start().refit_errors == {}
    start().keep_refit({})
    assert start().refit_errors == {} and not (tmp_path / "stages").exists(), "no refit, nothing to keep"
    start().keep_refit({3: {"error_before": 0.2, "error_after": 0.1}})
    start().keep_refit({3: {"error_before": 0.3, "error_after": 0.3}})
    assert start().refit_errors == {"3": {"error_before": 0.2, "error_after": 0.1}}


def test_figures_and_seconds_are_kept_over_restarts(tmp_path: Path) -> None:
    first = RunRecord(tmp_path, {"weights": "w"})
    assert not first.has("original") and first.seconds == {}
    first.keep("original", {"loss": 2.0})
    with first.timed("search"), first.timed("calibrate"):
        pass
    again = RunRecord(tmp_path, {"weights": "w"})
    assert again.has("original") and again.figures("original") == {"loss": 2.0}
    assert set(again.seconds) == {"search", "calibrate"}
    with again.timed_recovery("sft"):
        pass
    before = again.recovery_seconds["sft"]
    with again.timed_recovery("sft"):
        pass
    assert again.recovery_seconds["sft"] > before, "restarts add up"


def test_a_part_within_another_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 4.0, 6.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    record = RunRecord(tmp_path, {})
    with record.timed("search"), record.timed("calibrate"):
        pass
    assert record.seconds == {"calibrate": 3.0, "search": 3.0}
