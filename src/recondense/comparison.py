"""Runs that differ by their seed alone, as one line: mean and standard deviation, as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from recondense.pictures import save_figure, start_figure
from recondense.report import format_bytes, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
# Colours that are told apart without colour vision where the mark differs as well: 7 x 3 looks.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d", "8")
DASHES = ("-", "--", ":")


def by_seed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for all runs that differ by `seed` alone.

    Jobs that are one and the same run (a budget means nothing to method=none) count once, with the settings they share.

    Args:
        rows: as for `report.sweep_table`.

    Returns:
        entries with `settings` (without the seed), `method`, `count` of the runs that ended, `status` (of the first
        that failed, or "done"), and for each figure (mean, sample standard deviation; None for a single run). Largest
        budget first, then by perplexity, those without any last.
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
    return -budget, _last_perplexity(entry)


def _last_perplexity(entry: Mapping[str, Any]) -> float:
    for stage in ("recovered", "refitted", "compressed"):
        if f"{stage}_perplexity" in entry:
            return float(entry[f"{stage}_perplexity"][0])
    return float("inf")


def comparison_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """The entries of `by_seed` for a terminal: the mean, below it the standard deviation."""
    header, body = comparison_cells(entries)
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
    original, size = (_level(entries, f"original_{what}") for what in ("perplexity", "weights_bytes"))
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


def comparison_cells(entries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table, as texts."""
    shown = columns(entries)
    header = ["run", "n", *(title for title, _ in shown.values())]
    body = []
    for entry in entries:
        count = str(entry["count"]) + ("" if entry["status"] == "done" else " (failed)")
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


def _level(entries: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The figure that all entries have in common; None where they differ or lack it."""
    found = {round(entry[key][0], 9) for entry in entries if key in entry}
    return found.pop() if len(found) == 1 else None


def comparison_picture(entries: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Perplexity against bytes, a line a method, before and after recovery side by side; bars are standard deviations.

    Horizontal lines: the original, and the control (the original trained further).

    Returns:
        `path`, or None without two methods to compare.
    """
    shown = [entry for entry in entries if "weights_bytes" in entry and "compressed_perplexity" in entry]
    # From best to worst at the end, which is also the order of the lines' ends.
    ranked = sorted(shown, key=lambda entry: (entry["weights_bytes"][0] > _middle(shown), _last_perplexity(entry)))
    methods = list(dict.fromkeys(entry["method"] for entry in ranked))
    if len(methods) < 2:
        return None
    looks = {method: _look(index) for index, method in enumerate(sorted(methods))}
    stages = [stage for stage in STAGES if any(f"{stage}_perplexity" in entry for entry in shown)]
    figure = start_figure(4.0 * len(stages) + 1.9, 4.8)
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    control = [entry for entry in entries if entry["method"] == CONTROL]
    for axes, stage in zip(panels, stages, strict=True):
        for method in methods:
            own = [entry for entry in shown if entry["method"] == method and f"{stage}_perplexity" in entry]
            _draw_line(axes, sorted(own, key=lambda entry: entry["weights_bytes"][0]), stage, looks[method], method)
        _draw_levels(axes, _level(entries, "original_perplexity"), control if stage == "recovered" else [])
        _finish(axes, [entry[f"{stage}_perplexity"][0] for entry in shown if f"{stage}_perplexity" in entry])
        axes.set_title(STAGES[stage][1], fontsize=10)
    panels[0].set_ylabel("validation perplexity")
    handles = dict(zip(*reversed(panels[-1].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8)
    return save_figure(figure, path)


def _middle(entries: Sequence[Mapping[str, Any]]) -> float:
    sizes = [entry["weights_bytes"][0] for entry in entries]
    return (min(sizes) + max(sizes)) / 2 if sizes else 0.0


def _look(index: int) -> dict[str, Any]:
    """A colour, a mark and dashes that no other of 21 methods has together."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "marker": MARKS[index % len(MARKS)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
        "markersize": 6.5,
        "linewidth": 1.3,
    }


def _draw_line(axes: Axes, own: Sequence[Mapping[str, Any]], stage: str, look: Mapping[str, Any], method: str) -> None:
    figures = [entry[f"{stage}_perplexity"] for entry in own]
    axes.errorbar(
        [entry["weights_bytes"][0] / 1e6 for entry in own],
        [mean for mean, _ in figures],
        yerr=[deviation or 0.0 for _, deviation in figures],
        label=method,
        capsize=2,
        elinewidth=0.9,
        **look,
    )


def _draw_levels(axes: Axes, original: float | None, control: Sequence[Mapping[str, Any]]) -> None:
    if original is not None:
        axes.axhline(original, color="black", linewidth=1, linestyle=(0, (1, 1)), label="original", zorder=1)
    for entry in control[:1]:
        mean, deviation = entry.get("recovered_perplexity", (None, None))
        if mean is not None:
            axes.axhline(
                mean, color="#777777", linewidth=1, linestyle="-.", label="original, trained further", zorder=1
            )
            if deviation:
                axes.axhspan(mean - deviation, mean + deviation, color="#777777", alpha=0.15, linewidth=0)


def _finish(axes: Axes, heights: Sequence[float]) -> None:
    """Axes, logarithmic where the perplexities span more than a factor of three."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if heights and max(heights) > 3 * min(heights) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 3.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("weights (MB)")
    axes.margins(x=0.08)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
