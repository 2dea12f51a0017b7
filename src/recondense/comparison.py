"""Runs that differ by their seed alone, as one line: mean and standard deviation, as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from recondense.report import format_bytes, format_number

BUDGET = "method.memory_ratio"
CONTROL = "none"  # the method without steps: what a recovery makes of it is the original trained further
# Key of a row, title (broken at the line's end in a terminal), form.
COLUMNS: dict[str, tuple[str, Any]] = {
    "weights_bytes": ("weights", format_bytes),
    "memory_ratio": ("memory\nratio", "{:.3f}".format),
    "routed_expert_ratio": ("expert\nratio", "{:.3f}".format),
    "compressed_perplexity": ("ppl\nbefore", format_number),
    "refitted_perplexity": ("ppl\nrefit", format_number),
    "recovered_perplexity": ("ppl\nafter", format_number),
    "refit_gap_closed": ("refit\ncloses", "{:.0%}".format),
    "gap_closed": ("all\ncloses", "{:.0%}".format),
    "seconds": ("seconds", "{:.0f}".format),
}
# Word of a column, title of a panel.
STAGES = {
    "compressed": ("before", "compressed"),
    "refitted": ("refit", "refitted, not trained"),
    "recovered": ("after", "recovered"),
}
OTHERS = ("original_perplexity", "original_weights_bytes")


def by_seed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for all runs that differ by `seed` alone.

    Jobs that are one and the same run (a budget means nothing to method=none) count once, with the settings they share.

    Args:
        rows: as for `report.sweep_table`.

    Returns:
        entries with `settings` (without the seed), `method`, `jobs`, `count` of those that ended, `status` (of the
        first that failed, or "done"), and for each figure (mean, sample standard deviation; None for a single run).
        Largest budget first, then by perplexity, those without any last.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Mapping[str, Any]]] = {}
    for row in _distinct(rows):
        key = tuple((name, value) for name, value in row["settings"].items() if name != "seed")
        groups.setdefault(key, []).append(row)
    found = []
    for key, members in groups.items():
        entry: dict[str, Any] = {
            "settings": dict(key),
            "method": str(next((row["method"] for row in members if "method" in row), dict(key).get("method", ""))),
            "jobs": len(members),
            "count": sum(row["status"] == "done" for row in members),
            "status": next((row["status"] for row in members if row["status"] != "done"), "done"),
        }
        for name in [*columns(rows), *OTHERS]:
            values = [float(row[name]) for row in members if name in row]
            if values:
                entry[name] = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
        found.append(entry)
    return sorted(found, key=_order)


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Title and form of the figures that some row or entry has: `COLUMNS`, with the tasks before the seconds."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: column for name, column in COLUMNS.items() if name in names}
    tasks: dict[str, list[str]] = {}
    for name in names:
        stage, _, task = name.partition("_")
        if stage in STAGES and name not in COLUMNS:
            tasks.setdefault(task, []).append(stage)
    for task, stages in tasks.items():
        for stage in (stage for stage in STAGES if stage in stages):
            title = f"{task.removeprefix('heldout_')}_{STAGES[stage][0]}".replace("_", "\n")
            found[f"{stage}_{task}"] = (title, "{:.3f}".format)
    seconds = found.pop("seconds", None)
    return found if seconds is None else {**found, "seconds": seconds}


def _distinct(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each run once; of the settings those in which its jobs agree."""
    found: dict[Any, Mapping[str, Any]] = {}
    for number, row in enumerate(rows):
        key = row["run_folder"] if row["status"] == "done" and "run_folder" in row else number
        if key in found:
            shared = found[key]["settings"].items() & row["settings"].items()
            settings = {name: value for name, value in row["settings"].items() if (name, value) in shared}
            row = {**found[key], "settings": settings}
        found[key] = row
    return list(found.values())


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
    """The entries of `by_seed` for a terminal: the mean, below it the standard deviation."""
    header, body = comparison_cells(entries, without=["weights_bytes"])  # narrow; the ratio says it too
    table = Table(
        title="comparison: mean ± standard deviation over seeds",
        title_justify="left",
        title_style="bold",
        caption=caption(entries),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index == 0 else "right", overflow="fold", no_wrap=index == 0)
    for line in body:
        table.add_row(*(cell.replace(" ± ", "\n[dim]±", 1) + "[/dim]" if " ± " in cell else cell for cell in line))
    return table


def comparison_markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """The same as a Markdown table, with its caption."""
    header, body = comparison_cells(entries)
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [[cell.replace("\n", " ").replace("|", "\\|") for cell in line] for line in [header, rule, *body]]
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
        + "\n\n"
        + caption(entries).replace("\n", "\n\n")
        + "\n"
    )


def caption(entries: Sequence[Mapping[str, Any]]) -> str:
    """What the figures of a comparison mean, and what failed, one line each."""
    original, size = (common_level(entries, f"original_{what}") for what in ("perplexity", "weights_bytes"))
    words = ["n runs each; where no ± stands, all gave the same."]
    words += ["The seed changes the order of the training text and what a method draws at random; the model is one."]
    words += [] if original is None else [f"Original: perplexity {format_number(original)}."]
    words += [] if size is None else [f"Its weights: {format_bytes(size)}."]
    if any("recovered_perplexity" in entry for entry in entries):
        refitted = any("refitted_perplexity" in entry for entry in entries)
        words += [f"Before and after recovery{', which starts from the refitted model' if refitted else ''}."]
    if any(entry["method"] == CONTROL for entry in entries):
        words += [f"{CONTROL}: the original trained further for the same steps."]
    if any("gap_closed" in entry or "refit_gap_closed" in entry for entry in entries):
        words += ["Closed: share of the loss that compression added."]
    words += ["A search is made once; its seconds count where it was made."]
    failed = [f"{_name(entry)}: {entry['status']}" for entry in entries if entry["status"] != "done"]
    return "\n".join([" ".join(words), *failed])


def comparison_cells(
    entries: Sequence[Mapping[str, Any]], *, without: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table, as texts; `without` some figures."""
    shown = {name: column for name, column in columns(entries).items() if name not in without}
    header = ["run", "n", *(title for title, _ in shown.values())]
    body = []
    for entry in entries:
        count = f"{entry['count']} of {entry['jobs']}" if entry["status"] != "done" else str(entry["count"])
        body.append([_name(entry), count, *(_mean(entry.get(key), form) for key, (_, form) in shown.items())])
    return header, body


def _name(entry: Mapping[str, Any]) -> str:
    return ", ".join(value for value in entry["settings"].values() if value)


def _mean(value: tuple[float, float | None] | None, form: Any) -> str:
    """The mean, and the deviation with as many decimals."""
    if value is None:
        return "-"
    mean, deviation = value
    shown = form(mean)
    if not deviation:
        return str(shown)
    number = shown.rstrip("%").replace(",", "")
    if not number.replace(".", "").replace("-", "").isdigit():  # with a unit of its own
        return f"{shown} ± {form(deviation)}"
    decimals = len(number.partition(".")[2])
    percent = shown.endswith("%")
    return f"{shown} ± {deviation * (100 if percent else 1):.{decimals}f}{'%' if percent else ''}"


def common_level(entries: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The figure that all entries have in common; None where they differ or lack it."""
    found = {round(entry[key][0], 9) for entry in entries if key in entry}
    return found.pop() if len(found) == 1 else None
