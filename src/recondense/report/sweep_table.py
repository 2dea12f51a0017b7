"""The table of a sweep: one row per run, with the settings in which the runs differ."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from recondense.full_disk import format_bytes
from recondense.report.tables import find_figure, format_number, main_metrics, plain_table

PROFILE = ("peak_memory_bytes", "prefill_tokens_per_second", "decode_tokens_per_second")  # the cost of a stage
SHARES = ("acc", "exact_match")  # main metrics that are a share of right answers begin with one of these


def sweep_row(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's row for a comparison: the figures of its `summary.json`, without those not measured."""
    final = "recovered" if "recovered" in summary.get("stages", {}) else "compressed"
    measured = "compressed" in summary.get("parameters", {}).get("total", {})
    paths = {
        "method": ("method",),
        "recovery": ("recovery",),
        "original_perplexity": ("stages", "original", "perplexity"),
        "compressed_perplexity": ("stages", "compressed", "perplexity"),
        "refitted_perplexity": ("stages", "refitted", "perplexity"),
        "recovered_perplexity": ("stages", "recovered", "perplexity"),
        "original_weights_bytes": ("stages", "original", "profile", "weights_bytes"),
        "weights_bytes": ("stages", final, "profile", "weights_bytes"),
        **{f"original_{name}": ("stages", "original", "profile", name) for name in PROFILE},
        **{name: ("stages", final, "profile", name) for name in PROFILE},
        "total_parameters": ("parameters", "total", "compressed" if measured else "original"),
        "memory_ratio": ("ratios", "memory"),
        "routed_expert_ratio": ("ratios", "routed_expert_parameters"),
        "refit_gap_closed": ("ratios", "refit_gap_closed"),
        "gap_closed": ("ratios", "gap_closed"),
    }
    row = {name: find_figure(summary, path) for name, path in paths.items()}
    for name in ("weights_bytes", *PROFILE):
        if row[name] is None:
            row[name] = find_figure(summary, ("stages", "compressed", "profile", name))
    if row["memory_ratio"] is None and row["original_weights_bytes"] and row["weights_bytes"]:
        row["memory_ratio"] = (
            row["weights_bytes"] / row["original_weights_bytes"]
        )  # the control has no compressed stage
    for task, metric in main_metrics(summary):
        for stage in ("original", "compressed", "refitted", "recovered"):
            row[f"{stage}_{task}"] = find_figure(summary, ("stages", stage, "tasks", task, metric))
        row[f"original_{task}_error"] = find_figure(summary, ("stages", "original", "tasks", task, f"{metric}_stderr"))
    row |= _task_means(summary)
    row |= _seconds(summary)
    return {name: value for name, value in row.items() if value is not None}


def _task_means(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean score over the tasks with a share of right answers, by stage; `task_mean` is the last stage's."""
    shares = [(task, metric) for task, metric in main_metrics(summary) if metric.startswith(SHARES)]
    means: dict[str, float] = {}
    for stage in ("original", "compressed", "refitted", "recovered"):
        scores = [find_figure(summary, ("stages", stage, "tasks", task, metric)) for task, metric in shares]
        if scores and None not in scores:
            means[f"{stage}_task_mean"] = statistics.fmean(scores)
    if means:
        means["task_mean"] = list(means.values())[-1]
    return means


def _seconds(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the duration of the run, and of its search, refit and recovery without evaluation."""
    seconds, stages = summary.get("seconds", {}), summary.get("stages", {})
    if not seconds:
        return {}
    parts: dict[str, tuple[str, ...]] = {"search_seconds": ("calibrate", "search", "apply")}
    for part, stage in (("refit", "refitted"), ("recover", "recovered")):
        if stage in stages:
            parts[f"{part}_seconds"] = (part,)
    sums = {name: sum(seconds.get(part, 0.0) for part in names) for name, names in parts.items()}
    return {"seconds": sum(seconds.values()), **sums}


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with one row per run of a sweep. Columns without any figure are omitted.

    Args:
        rows: `sweep_row` of each run, with `settings` (mapping) and `status` ("done" or the reason of the failure).
    """
    columns: dict[str, tuple[str, Any]] = {
        "compressed_perplexity": ("perplexity\ncompr.", format_number),
        "refitted_perplexity": ("perplexity\nrefit", format_number),
        "recovered_perplexity": ("perplexity\nrecov.", format_number),
        "weights_bytes": ("weights", format_bytes),
        "memory_ratio": ("memory\nratio", "{:z.4f}".format),
        "routed_expert_ratio": ("expert\nratio", "{:z.4f}".format),
        "task_mean": ("task\nmean", "{:z.3f}".format),
        "peak_memory_bytes": ("peak\nmemory", format_bytes),
        "prefill_tokens_per_second": ("prefill\ntok/s", format_number),
        "decode_tokens_per_second": ("decode\ntok/s", format_number),
        "seconds": ("seconds", "{:.1f}".format),
    }
    columns = {name: column for name, column in columns.items() if any(name in row for row in rows)}
    settings = list(dict.fromkeys(key for row in rows for key in row.get("settings", {})))
    table = plain_table("comparison")
    for key in settings:
        table.add_column(key.replace(".", "\n.", 1), style="bold", overflow="fold")
    for title, _ in columns.values():
        table.add_column(title, justify="right", overflow="fold")
    failed = any(row.get("status", "done") != "done" for row in rows)
    if failed:
        table.add_column("status")
    for row in rows:
        cells = [str(row.get("settings", {}).get(key, "")) for key in settings]
        cells += [form(row[name]) if name in row else "-" for name, (_, form) in columns.items()]
        table.add_row(*cells, *([str(row.get("status", "done"))] if failed else []))
    return table
