"""A run's row for a comparison: speed, memory and mean scores of its last stage, beside the original's."""

from __future__ import annotations

from typing import Any

import pytest

from recondense.report.sweep_table import sweep_row, sweep_table


def stage(scores: dict[str, float], speed: float | None = None) -> dict[str, Any]:
    figures: dict[str, Any] = {"tasks": {task: {"acc": score, "acc_stderr": 0.1} for task, score in scores.items()}}
    figures["tasks"]["text"] = {"byte_perplexity": 7.0}
    if speed is not None:
        figures["profile"] = {
            "weights_bytes": 100, "peak_memory_bytes": 200,
            "prefill_tokens_per_second": 10 * speed, "decode_tokens_per_second": speed,
        }  # fmt: skip
    return figures


def test_the_last_stage_counts() -> None:
    stages = {
        "original": stage({"a": 0.8, "b": 0.6}, 1.0),
        "compressed": stage({"a": 0.4, "b": 0.2}, 2.0),
        "recovered": stage({"a": 0.6, "b": 0.5}, 3.0),
    }
    row = sweep_row({"method": "cdmoe", "stages": stages})
    assert (row["decode_tokens_per_second"], row["prefill_tokens_per_second"]) == (3.0, 30.0)
    assert (row["original_decode_tokens_per_second"], row["peak_memory_bytes"]) == (1.0, 200)
    means = [row[f"{name}task_mean"] for name in ("original_", "compressed_", "recovered_", "")]
    assert means == pytest.approx([0.7, 0.3, 0.55, 0.55]), "without the perplexity"
    del stages["recovered"]["profile"]
    assert sweep_row({"stages": stages})["decode_tokens_per_second"] == 2.0, "as the compressed model"


def test_what_was_not_measured_is_absent() -> None:
    row = sweep_row({"method": "cdmoe", "stages": {"compressed": {"perplexity": 3.0}}})
    assert not [name for name in row if "task_mean" in name or "second" in name or "peak" in name]
    half = {"original": stage({"a": 0.8}), "compressed": {"perplexity": 3.0}}
    row = sweep_row({"stages": half})
    assert row["original_task_mean"] == row["task_mean"] == 0.8 and "compressed_task_mean" not in row
    assert "task_mean" not in sweep_row({"stages": {"compressed": stage({})}}), "only a perplexity"


def test_the_table_has_a_column_for_each() -> None:
    row = sweep_row({"method": "cdmoe", "stages": {"compressed": stage({"a": 0.5}, 2.0)}})
    table = sweep_table([{**row, "settings": {"method": "cdmoe"}, "status": "done"}])
    titles = [str(column.header).replace("\n", " ") for column in table.columns]
    assert titles == ["method", "weights", "task mean", "peak memory", "prefill tok/s", "decode tok/s"]
