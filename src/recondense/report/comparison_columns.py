"""The columns of a comparison: which figures there are, how they are called and shown, and their typed values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recondense.full_disk import format_bytes
from recondense.report.tables import format_number

TASK_MEAN = "task_mean"
# Key of a row: (title with line breaks for a terminal, format function).
COLUMNS: dict[str, tuple[str, Any]] = {
    "weights_bytes": ("weights", format_bytes),
    "memory_ratio": ("memory\nratio", "{:z.3f}".format),
    "routed_expert_ratio": ("expert\nratio", "{:z.3f}".format),
    "compressed_perplexity": ("ppl\nbefore", format_number),
    "refitted_perplexity": ("ppl\nrefit", format_number),
    "recovered_perplexity": ("ppl\nafter", format_number),
    "refit_gap_closed": ("refit\ncloses", "{:z.0%}".format),
    "gap_closed": ("all\ncloses", "{:z.0%}".format),
    "peak_memory_bytes": ("peak\nmemory", format_bytes),
    "prefill_tokens_per_second": ("prefill\ntok/s", format_number),
    "decode_tokens_per_second": ("decode\ntok/s", format_number),
}
SECONDS: dict[str, tuple[str, Any]] = {
    "search_seconds": ("search\n(s)", "{:.0f}".format),
    "refit_seconds": ("refit\n(s)", "{:.0f}".format),
    "recover_seconds": ("recover\n(s)", "{:.0f}".format),
}
# Stage: (word in a column's title, title of a panel).
STAGES = {
    "compressed": ("before", "compressed"),
    "refitted": ("refit", "refitted, not trained"),
    "recovered": ("after", "recovered"),
}


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Return title and format function of each figure that occurs in a row or entry: `COLUMNS`, tasks, `SECONDS`."""
    names = dict.fromkeys(name for row in rows for name in row)
    shown = {name: column for name, column in COLUMNS.items() if name in names}
    for task in tasks_of(names):
        error = sampling_error(rows, task)
        for stage in (stage for stage in STAGES if f"{stage}_{task}" in names):
            title = f"{task_words(task)} {STAGES[stage][0]}".replace(" ", "\n")
            shown[f"{stage}_{task}"] = (title, (f"{{:z.{3 if error < 0.01 else 2}f}}").format)
    return shown | {name: column for name, column in SECONDS.items() if name in names}


def tasks_of(names: Iterable[str]) -> list[str]:
    """Return the tasks that have a score in some stage."""
    parts = [name.partition("_") for name in names if name not in COLUMNS]
    return list(dict.fromkeys(task for stage, _, task in parts if stage in STAGES))


def task_words(task: str) -> str:
    return task.removeprefix("heldout_").replace("_", " ")


def sampling_error(rows: Sequence[Mapping[str, Any]], task: str) -> float:
    """Return the standard error of the original's score, due to the choice of questions; 0 if unknown."""
    values = [row[f"original_{task}_error"] for row in rows if f"original_{task}_error" in row]
    return max((value[0] if isinstance(value, tuple) else float(value) for value in values), default=0.0)


def redundant_means(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns of the mean over tasks if there is only one task in it."""
    tasks = tasks_of(columns(entries))
    for task in tasks:
        pairs = [
            (entry.get(f"{stage}_{task}"), entry.get(f"{stage}_{TASK_MEAN}")) for entry in entries for stage in STAGES
        ]
        if task != TASK_MEAN in tasks and all(score == mean for score, mean in pairs):
            return [f"{stage}_{TASK_MEAN}" for stage in STAGES]
    return []


def comparison_values(entries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Return the header and the rows of a comparison as values: numbers are numbers, and None where there is none.

    Args:
        entries: as returned by `comparison.by_seed`.

    Returns:
        The settings by dotted name (numbers in a column that has only numbers), the method, the number of finished
        runs, the status, and for each figure its mean over seeds, followed by its standard deviation (`<name>_std`) if
        any entry has one. Sizes are in bytes, perplexities and ratios plain, scores between 0 and 1.
    """
    settings = list(dict.fromkeys(key for entry in entries for key in entry["settings"]))
    values: dict[str, list[Any]] = {key: _typed([entry["settings"].get(key) for entry in entries]) for key in settings}
    values |= {
        "method": [entry["method"] for entry in entries],
        "runs": [entry["count"] for entry in entries],
        "status": [entry["status"] for entry in entries],
    }
    for name in columns(entries):
        figures = [entry.get(name, (None, None)) for entry in entries]
        values[name] = [mean for mean, _ in figures]
        if any(deviation is not None for _, deviation in figures):
            values[f"{name}_std"] = [deviation for _, deviation in figures]
    return list(values), [list(row) for row in zip(*values.values(), strict=True)]


def _typed(texts: Sequence[str | None]) -> list[Any]:
    """Return the values of a setting as numbers if all are numbers, else as they are."""
    numbers = [None if text is None else _number(text) for text in texts]
    return (
        numbers
        if all((text is None) == (number is None) for text, number in zip(texts, numbers, strict=True))
        else [*texts]
    )


def _number(text: str) -> float | int | None:
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else None
    return None
