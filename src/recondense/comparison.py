"""Runs that differ by their seed alone, as one line: mean and standard deviation, as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from recondense.pictures import LINES, MARKS, save_figure, start_figure
from recondense.report import format_number

# Key of a row, title, form.
COLUMNS: dict[str, tuple[str, Any]] = {
    "memory_ratio": ("memory", "{:.3f}".format),
    "routed_expert_ratio": ("routed experts", "{:.3f}".format),
    "compressed_perplexity": ("compressed", format_number),
    "refitted_perplexity": ("refitted", format_number),
    "refit_gap_closed": ("refit closes", "{:.0%}".format),
    "recovered_perplexity": ("recovered", format_number),
    "gap_closed": ("all close", "{:.0%}".format),
    "compressed_heldout_next_line": ("task before", "{:.3f}".format),
    "recovered_heldout_next_line": ("task after", "{:.3f}".format),
    "seconds": ("seconds", "{:.0f}".format),
}


def by_seed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for all runs that differ by `seed` alone; those that failed keep their status.

    Args:
        rows: as for `report.sweep_table`.

    Returns:
        entries with `settings` (without the seed), `method`, `count`, `status`, and for each figure its (mean, standard
        deviation of the sample or None), smallest budgets last, best recovered perplexity first.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple((name, value) for name, value in row["settings"].items() if name != "seed")
        groups.setdefault(key, []).append(row)
    found = []
    for key, members in groups.items():
        entry: dict[str, Any] = {
            "settings": dict(key),
            "method": members[0].get("method", dict(key).get("method", "")),
            "count": len(members),
            "status": next((row["status"] for row in members if row["status"] != "done"), "done"),
        }
        for name in [*COLUMNS, "weights_bytes", "original_perplexity", "original_weights_bytes"]:
            values = [float(row[name]) for row in members if name in row]
            if values:
                entry[name] = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
        found.append(entry)
    return sorted(found, key=_order)


def _order(entry: Mapping[str, Any]) -> tuple[float, float]:
    budget = -float(entry["settings"].get("method.memory_ratio", 0) or 0)
    last = entry.get("recovered_perplexity") or entry.get("compressed_perplexity") or (float("inf"), None)
    return budget, last[0]


def comparison_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """The entries of `by_seed` for a terminal: mean ± standard deviation."""
    table = Table(title="comparison: mean ± standard deviation over seeds", box=box.SIMPLE_HEAD, title_justify="left")
    header, body = _cells(entries)
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index == 0 else "right", overflow="fold")
    for line in body:
        table.add_row(*line)
    return table


def comparison_markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """The same as a Markdown table."""
    header, body = _cells(entries)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *body]) + "\n"


def _cells(entries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = {name: column for name, column in COLUMNS.items() if any(name in entry for entry in entries)}
    failed = any(entry["status"] != "done" for entry in entries)
    header = ["run", "n", *(title for title, _ in columns.values()), *(["status"] if failed else [])]
    body = []
    for entry in entries:
        name = ", ".join(value for value in entry["settings"].values() if value)
        cells = [_mean(entry.get(key), form) for key, (_, form) in columns.items()]
        body.append([name, str(entry["count"]), *cells, *([entry["status"]] if failed else [])])
    return header, body


def _mean(value: tuple[float, float | None] | None, form: Any) -> str:
    if value is None:
        return "-"
    mean, deviation = value
    return form(mean) if not deviation else f"{form(mean)} ± {form(deviation)}"


def comparison_picture(entries: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Perplexity against bytes, a line a method, before and after recovery side by side; bars are standard deviations.

    Returns:
        `path`, or None without two methods to compare.
    """
    shown = [entry for entry in entries if "weights_bytes" in entry and "compressed_perplexity" in entry]
    methods = list(dict.fromkeys(entry["method"] for entry in shown))
    if len(methods) < 2:
        return None
    stages = [s for s in ("compressed", "refitted", "recovered") if any(f"{s}_perplexity" in e for e in shown)]
    figure = start_figure(4.2 * len(stages) + 1.8, 4.6)
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    for axes, stage in zip(panels, stages, strict=True):
        for index, method in enumerate(methods):
            own = [entry for entry in shown if entry["method"] == method and f"{stage}_perplexity" in entry]
            own.sort(key=lambda entry: entry["weights_bytes"][0])
            style: dict[str, Any] = {
                "color": LINES[index % len(LINES)],
                "marker": MARKS[(index // len(LINES) + index) % len(MARKS)],
                "linestyle": ("-", "--", ":")[index // len(LINES)],
                "markersize": 5,
                "linewidth": 1.2,
            }
            axes.errorbar(
                [entry["weights_bytes"][0] / 1e6 for entry in own],
                [entry[f"{stage}_perplexity"][0] for entry in own],
                yerr=[entry[f"{stage}_perplexity"][1] or 0.0 for entry in own],
                label=method,
                capsize=2,
                **style,
            )
        for entry in shown[:1]:
            if "original_perplexity" in entry:
                axes.axhline(entry["original_perplexity"][0], color="#666666", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.set_title(
            {"compressed": "compressed", "refitted": "refitted, no training", "recovered": "recovered"}[stage]
        )
        axes.set_xlabel("weights (MB)")
        axes.grid(alpha=0.25, which="both")
    panels[0].set_ylabel("validation perplexity (dotted: original)")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return save_figure(figure, path)
