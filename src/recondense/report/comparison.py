"""Table of the runs of a sweep. Runs that differ only in their seed share a row of means and standard deviations."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from recondense.errors import UserError
from recondense.full_disk import format_bytes
from recondense.report.comparison_columns import (
    COLUMNS,
    STAGES,
    columns,
    redundant_means,
    sampling_error,
    task_words,
    tasks_of,
)
from recondense.report.sweep_table import sweep_row
from recondense.report.tables import TABLE_WIDTH, format_number

BUDGET = "method.memory_ratio"
PLACES = ("run_dir", "output_dir", "cache_dir", "overwrite")  # settings of paths, which do not distinguish runs
CONTROL = "none"  # the method without steps; with a recovery, it trains the original further
IN_WORDS = "weights_bytes"  # not in the tables, because the memory ratio expresses it
FOLLOWS = ("refit_gap_closed", "gap_closed")
SPARE = (
    "refit_seconds",
    "prefill_tokens_per_second",
    "peak_memory_bytes",
    "refit_gap_closed",
)  # omitted first where the width is short


def compare(folders: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Return the figures of finished runs for a comparison.

    Args:
        folders: folders of finished runs.

    Returns:
        One row per run, in the order of the folders, with `run_folder`, `settings` (those in which the runs differ, by
        dotted name), `status`, and the figures: perplexities, sizes in bytes, numbers of parameters, ratios, and
        durations in seconds. Figures that were not measured are absent. `sweep_table.sweep_table` prints the rows.

    Raises:
        UserError: a folder contains no finished run.

    Examples:
        >>> rows = rc.compare([first_run, second_run])
        >>> [row["settings"] for row in rows]
        [{'recovery.steps': '2'}, {'recovery.steps': '4'}]
    """
    rows, configs = [], []
    for folder in map(Path, folders):
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            configs.append(_flatten(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))))
        except FileNotFoundError as error:
            raise UserError(f"{folder} contains no finished run ({Path(error.filename).name} is missing)") from None
        rows.append({"run_folder": str(folder), "settings": {}, "status": "done", **sweep_row(summary)})
    for name in dict.fromkeys(name for config in configs for name in config):
        values = [config.get(name) for config in configs]
        if name not in PLACES and any(value != values[0] for value in values):
            for row, value in zip(rows, values, strict=True):
                row["settings"][name] = str(value)
    return rows


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def by_seed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each group of runs that differ only in `seed`.

    Jobs that resulted in the same run (method=none ignores the budget) count once, with the settings they share.

    Args:
        rows: rows of `sweep_table.sweep_row`, with `settings` and `status`.

    Returns:
        Entries with `settings` (without the seed), `method`, `jobs` (number of runs), `count` (number of finished
        runs), `status` (of the first run that failed, or "done"), and for each figure a tuple of its mean and sample
        standard deviation (None for a single run). `search_seconds` has the maximum instead of the mean and no
        deviation. The largest budget comes first; entries of one budget are sorted by perplexity, those without any
        last.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Mapping[str, Any]]] = {}
    for row in _distinct(rows):
        key = tuple((name, value) for name, value in row["settings"].items() if name != "seed")
        groups.setdefault(key, []).append(row)
    entries = []
    for key, members in groups.items():
        entry: dict[str, Any] = {
            "settings": dict(key),
            "method": str(next((row["method"] for row in members if "method" in row), dict(key).get("method", ""))),
            "jobs": len(members),
            "count": sum(row["status"] == "done" for row in members),
            "status": next((row["status"] for row in members if row["status"] != "done"), "done"),
        }
        for name in [*columns(rows), *dict.fromkeys(key for row in rows for key in row if key.startswith("original_"))]:
            values = [float(row[name]) for row in members if name in row]
            if values and name == "search_seconds":
                entry[name] = max(values), None  # the other runs took its result from the cache
            elif values:
                entry[name] = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
        entries.append(entry)
    return sorted(entries, key=_order)


def _distinct(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return each run once, with the settings in which its jobs agree."""
    runs: dict[Any, Mapping[str, Any]] = {}
    for number, row in enumerate(rows):
        key = row["run_folder"] if row["status"] == "done" and "run_folder" in row else number
        if key in runs:
            shared = runs[key]["settings"].items() & row["settings"].items()
            settings = {name: value for name, value in row["settings"].items() if (name, value) in shared}
            row = {**runs[key], "settings": settings}
        runs[key] = row
    return list(runs.values())


def _order(entry: Mapping[str, Any]) -> tuple[float, float]:
    try:
        budget = float(entry["settings"][BUDGET])
    except (KeyError, ValueError):
        budget = entry.get("memory_ratio", (1.0, None))[0]
    return -budget, last_perplexity(entry)


def last_perplexity(entry: Mapping[str, Any]) -> float:
    for stage in ("recovered", "refitted", "compressed"):
        if f"{stage}_perplexity" in entry:
            return float(entry[f"{stage}_perplexity"][0])
    return float("inf")


def comparison_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the entries of `by_seed` for a terminal: one section per budget, deviations below means."""
    without = _left_out(entries)
    for more in (*SPARE, None):
        table = _comparison_table(entries, without)
        if more is None or Console(width=10 * TABLE_WIDTH).measure(table).maximum <= TABLE_WIDTH:
            break
        without.append(more)
    table.caption = "\n".join(caption(entries, without=without))
    return table


def _comparison_table(entries: Sequence[Mapping[str, Any]], without: Sequence[str]) -> Table:
    """Return the table without its caption."""
    header, body = comparison_cells(entries, without=without)
    table = Table(
        title="comparison: mean ± standard deviation over seeds",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # so that a dozen columns fit 120 characters
        pad_edge=False,
        show_edge=False,
    )
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index == 0 else "right", overflow="fold", no_wrap=index == 0)
    budgets = [entry["settings"].get(BUDGET) for entry in entries]
    for line, budget, following in zip(body, budgets, [*budgets[1:], None], strict=True):
        cells = (cell.replace(" ± ", "\n[dim]±", 1) + "[/dim]" if " ± " in cell else cell for cell in line)
        table.add_row(*cells, end_section=budget != following)
    return table


def comparison_markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the entries of `by_seed` as a Markdown table without the refit's seconds, with its caption as a list."""
    without = [*_left_out(entries), "refit_seconds"]
    header, body = comparison_cells(entries, without=without)
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [[cell.replace("\n", " ").replace("|", "\\|") for cell in line] for line in [header, rule, *body]]
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*table, "", *(f"- {line}" for line in caption(entries, without=without))]) + "\n"


def caption(entries: Sequence[Mapping[str, Any]], *, without: Sequence[str] = ()) -> list[str]:
    """Return lines that explain the figures of a comparison and list the runs that failed.

    Args:
        entries: as returned by `by_seed`.
        without: figures that the table omits.
    """
    shown = set(columns(entries)) - set(without)
    count = entries[0]["count"] if "n" in without else "n"
    runs = "One run each." if count == 1 else f"{count} runs each; without ±, all runs have the same rounded value."
    lines = [
        runs,
        "The seed changes the order of the training text and the random choices of a method. The model, the "
        "calibration texts and the validation windows are fixed, so figures without training or random choices have "
        "no deviation.",
        *_original_words(entries),
        *filter(None, (_task_words(entries, task) for task in tasks_of(shown))),
    ]
    trained = any("recovered_perplexity" in entry for entry in entries)
    words = []
    if trained:
        refitted = any("refitted_perplexity" in entry for entry in entries)
        words += [
            "Before and after refer to recovery" + (", which starts from the refitted model." if refitted else ".")
        ]
    if trained and any(entry["method"] == CONTROL for entry in entries):
        words += [f"{CONTROL} is the original, trained further for the same steps on the next token."]
    if shown & set(FOLLOWS):
        words += ["Closes is the share of the loss added by compression that a stage removes."]
    lines += [" ".join(words)] if words else []
    if any(BUDGET in entry["settings"] for entry in entries) and "memory_ratio" in shown:
        lines += ["Methods that remove or condense entire layers can end below the budget; see the memory ratio."]
    if "search_seconds" in shown:
        lines += [
            "Seconds exclude the evaluation of the stages. Search (calibrate, search, apply) is the longest of all "
            "seeds, because other seeds may use the cached result. Work that serves all budgets (expert searches, "
            "importances, damages) is counted once."
        ]
    return lines + [f"{_name(entry)}: {entry['status']}" for entry in entries if entry["status"] != "done"]


def _original_words(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line with the original's figures that are the same in all entries; no line if there are none."""
    perplexity, size = (common_level(entries, f"original_{what}") for what in ("perplexity", "weights_bytes"))
    words = [] if perplexity is None else [f"perplexity {format_number(perplexity)}"]
    for task in tasks_of(columns(entries)):
        score, error = common_level(entries, f"original_{task}"), sampling_error(entries, task)
        if score is not None:
            words += [f"{task_words(task)} {score:z.3f}" + (f" (standard error {error:.3f})" if error else "")]
    words += [] if size is None else [f"weights {format_bytes(size)}"]
    return [f"Original: {', '.join(words)}."] if words else []


def _task_words(entries: Sequence[Mapping[str, Any]], task: str) -> str:
    """Return a sentence on which differences in a task's scores are significant; "" if the error is unknown."""
    error = sampling_error(entries, task)
    deviations = [
        entry[f"{stage}_{task}"][1] or 0.0 for entry in entries for stage in STAGES if f"{stage}_{task}" in entry
    ]
    if not error or not deviations:
        return ""
    larger = (
        f", larger than the deviation over seeds (at most {max(deviations):.3f})" if error > max(deviations) else ""
    )
    words = task_words(task).capitalize()
    return (
        f"{words}: the choice of questions causes a standard error of about {error:.2f}{larger}. "
        f"Differences below {2 * 2**0.5 * error:.2f} (two standard errors of a difference between independent "
        "samples) are not significant."
    )


def comparison_cells(
    entries: Sequence[Mapping[str, Any]], *, without: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table, as texts.

    Args:
        entries: as returned by `by_seed`.
        without: keys of figures to omit; "n" stands for the number of runs.
    """
    shown = {name: column for name, column in columns(entries).items() if name not in without}
    header = ["run", *([] if "n" in without else ["n"]), *(title for title, _ in shown.values())]
    body = []
    for entry in entries:
        count = f"{entry['count']}/{entry['jobs']}" if entry["status"] != "done" else str(entry["count"])
        figures = [_mean(entry.get(key), form) for key, (_, form) in shown.items()]
        body.append([_name(entry), *([] if "n" in without else [count]), *figures])
    return header, body


def _left_out(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns to omit: sizes, "n" if it is the same for all entries, and tasks of the refitted stage."""
    counts = ["n"] if len({(entry["count"], entry["status"]) for entry in entries}) == 1 else []
    trained = any("recovered_perplexity" in entry for entry in entries)
    tasks = [name for name in columns(entries) if name.startswith("refitted_") and name not in COLUMNS]
    return [IN_WORDS, *counts, *(tasks if trained else []), *redundant_means(entries)]


def _name(entry: Mapping[str, Any]) -> str:
    return ", ".join(value for value in entry["settings"].values() if value)


def _mean(value: tuple[float, float | None] | None, form: Any) -> str:
    """Return the mean, and the deviation with as many decimals."""
    if value is None:
        return "-"
    mean, deviation = value
    shown = str(form(mean))
    if not deviation:
        return shown
    number = shown.rstrip("%").replace(",", "")
    if not number.replace(".", "").replace("-", "").isdigit():  # the text has a unit
        return f"{shown} ± {form(deviation)}"
    unit = "%" if shown.endswith("%") else ""
    spread = f"{deviation * (100 if unit else 1):.{len(number.partition('.')[2])}f}"
    return f"{shown} ± {spread}{unit}" if float(spread) else shown


def common_level(entries: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the figure that all entries have in common; None where they differ or lack it."""
    levels = {round(entry[key][0], 9) for entry in entries if key in entry}
    return levels.pop() if len(levels) == 1 else None
