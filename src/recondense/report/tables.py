"""The results of a run as tables for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from recondense.full_disk import format_bytes
from recondense.report import beside_published

STAGES = ("original", "compressed", "refitted", "recovered", "control")  # result stages, in the order of a run
TABLE_WIDTH = 120  # of tables in a file or a pipe
MAX_TASK_COLUMNS = 3  # more tasks are shown in a separate table
# The metric that is shown for a task, in order of preference.
MAIN_METRICS = (
    "acc_mutual_info", "acc_norm", "acc", "exact_match", "mc2", "bleu", "f1", "byte_perplexity", "word_perplexity"
)  # fmt: skip


def print_report(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the content of `summary.json`: stages, tasks (in a separate table if there are many), and ratios."""
    console = console or _console()
    table = stage_table(summary)
    tasks = main_metrics(summary)
    width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    crowded = bool(tasks) and (len(tasks) > MAX_TASK_COLUMNS or width > console.width)
    tables = [stage_table(summary, with_tasks=False), task_table(summary)] if crowded else [table]
    rounds = [rounds_table(summary)] if summary.get("rounds") else []
    print_tables([*tables, *rounds, *published_tables(summary), ratios_table(summary)], console)
    for line in beside_published.notes(summary):
        console.print(f"\n{line}", soft_wrap=True, highlight=False)
    if summary.get("operations"):
        console.print(f"\nplan: {plan_line(summary['operations'])}", soft_wrap=True, highlight=False)
    if summary.get("refit"):
        where = " (last round)" if summary.get("rounds") else ""
        console.print(f"refit{where}: {refit_line(summary['refit'])}", soft_wrap=True, highlight=False)
    if summary.get("super_experts"):
        console.print(f"super experts: {super_experts_line(summary['super_experts'])}", soft_wrap=True, highlight=False)
    for stage in summary.get("recovery_stages") or ():
        if stage.get("layers"):
            text = f"local recovery, stage {stage['name']}: {refit_line(stage['layers'])}"
            console.print(text, soft_wrap=True, highlight=False)
    if summary.get("bytes_on_disk"):
        console.print(f"memory: {disk_line(summary)}", soft_wrap=True, highlight=False)


def disk_line(summary: Mapping[str, Any]) -> str:
    """Return a line that explains the memory ratio of an original stored in fewer bits than it computes in."""
    sizes = {name: format_bytes(size) for name, size in summary["bytes_on_disk"].items()}
    return (
        f"counted in bytes on disk ({sizes['compressed']} of {sizes['original']}), because the original is stored in "
        f"{summary['quantization']} and was dequantized on loading; weights and peak memory are those of the "
        "dequantized model"
    )


def refit_line(errors: Mapping[str, Mapping[str, float]]) -> str:
    """Return a line with the errors before and after a refit or a local recovery.

    Args:
        errors: `error_before` and `error_after` of each layer.
    """
    sides = []
    for key in ("error_before", "error_after"):
        values = [error[key] for error in errors.values()]
        spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        sides.append(f"{sum(values) / len(values):.3f}{spread}")
    layers = "1 layer" if len(errors) == 1 else f"mean and range of {len(errors)} layers"
    return f"relative error of a layer's output, before -> after: {' -> '.join(sides)}, {layers}"


def super_experts_line(record: Mapping[str, Any]) -> str:
    """Return a line that says which super experts a model has, and which of them the plan loses.

    Args:
        record: `largest_outputs`, `lost` and `changed`, as in plan.json.
    """
    words = _experts_of(record["largest_outputs"])
    lost = {kind: _experts_of(experts) for kind, experts in record["lost"].items()}
    words += f"; LOST: {'; '.join(f'{text} ({kind})' for kind, text in lost.items())}" if lost else ", all kept"
    changed = ", ".join(map(str, record.get("changed", ())))
    return words + (f"; kept but with other weights or without a router: layer {changed}" if changed else "")


def _experts_of(experts: Mapping[str, Iterable[Any]]) -> str:
    return "; ".join(f"layer {layer}: {', '.join(map(str, indices))}" for layer, indices in experts.items())


def recovery_words(summary: Mapping[str, Any]) -> str:
    """Return the recovery's name, and the objective if it differs (method=none has no teacher for distillation)."""
    name, objective = summary.get("recovery", "?"), summary.get("objective")
    return str(name) if objective in (None, name) else f"{name} (objective: {objective})"


def title_of(summary: Mapping[str, Any]) -> str:
    """Return the title of a run: the model, the method and the recovery."""
    method, recovery = summary.get("method", "?"), recovery_words(summary)
    changes = "unchanged" if (method, recovery) == ("none", "none") else f"{method} + {recovery}"
    return f"{summary.get('model', 'model')}: {changes}"


def plan_line(operations: Mapping[str, Mapping[str, float]]) -> str:
    """Return a plan in one line.

    Args:
        operations: as returned by `operation_counts`.
    """
    words = {
        "prune": "{layers} pruned ({retained} of {of} experts stay)",
        "constant": "{layers} with constants ({retained} of {of} experts stay, the others are constants)",
        "condense": "{layers} condensed ({retained} of {of} experts stay, {range}always active)",
        "merge": "{layers} merged ({of} experts into {groups})",
        "narrow": "{layers} narrowed",
        "factorize": "{layers} factorized",
        "drop_moe": "{layers} without their feed-forward block",
        "drop_layer": "{layers} removed",
        "refit": "{layers} refitted",
    }
    parts = []
    for name, counts in operations.items():
        layers = f"{counts['layers']} layer{'s' if counts['layers'] > 1 else ''}"
        numbers = f"{counts['fewest']} to {counts['most']} in a layer, " if "fewest" in counts else ""
        text = words[name].format(**{**counts, "layers": layers, "range": numbers})
        if "mean" in counts:
            text += f" (ranks {counts['lowest']}-{counts['highest']}, mean {counts['mean']:.1f})"
        if "mean_width" in counts:
            widths = "-".join(map(str, sorted({counts["narrowest"], counts["widest"]})))
            text += f" (experts {widths} wide, mean {counts['mean_width']:.1f})"
        parts.append(text)
    return ", ".join(parts) or "nothing changed"


def print_tables(tables: Iterable[Table], console: Console | None = None) -> None:
    """Print tables, each after an empty line; to stdout if no console is given."""
    console = console or _console()
    for table in tables:
        console.print()
        console.print(table)


def stage_table(summary: Mapping[str, Any], *, with_tasks: bool = True) -> Table:
    """Return a table with one row per result stage; the columns show quality, then cost.

    Below each figure is its ratio to the original model's. Columns without any figure are omitted.

    Args:
        summary: content of `summary.json`.
        with_tasks: whether to show the tasks.
    """
    stages = _present_stages(summary)
    original = stages.get("original", {})
    tasks = main_metrics(summary)
    columns: list[tuple[str, tuple[str, ...], Any]] = [
        ("perplexity", ("perplexity",), format_number),
        ("KL to\norig.", ("kl_to_original",), format_number),
    ]
    if with_tasks:
        columns += [
            (f"{task.replace('_', chr(10), 1)}\n{metric}", ("tasks", task, metric), format_number)
            for task, metric in tasks
        ]
    columns += [
        ("weights", ("profile", "weights_bytes"), format_bytes),
        ("peak\nmemory", ("profile", "peak_memory_bytes"), format_bytes),
        ("prefill\ntok/s", ("profile", "prefill_tokens_per_second"), format_number),
        ("decode\ntok/s", ("profile", "decode_tokens_per_second"), format_number),
    ]
    columns = [
        column for column in columns if any(find_figure(stage, column[1]) is not None for stage in stages.values())
    ]
    table = plain_table(title_of(summary))
    table.add_column("stage", style="bold", no_wrap=True)
    for title, _, _ in columns:
        table.add_column(title, justify="right", overflow="fold")
    for name, stage in stages.items():
        # Memory and speed are compared with the original's profile that was measured in alternation with this stage.
        beside = {**original, "profile": stage.get("original_profile") or original.get("profile")}
        base = original if name == "original" else beside
        cells = [_cell(find_figure(stage, path), find_figure(base, path), form, path) for _, path, form in columns]
        table.add_row(name, *("-" if name != "original" and not cell else cell for cell in cells))
    return table


def rounds_table(summary: Mapping[str, Any]) -> Table:
    """Return a table with the model's size and quality after each round; figures that were not measured are omitted."""
    names = {"parameters": "parameters", "perplexity": "perplexity", "kl_to_original": "KL to orig."}
    rounds = summary["rounds"]
    measured = {key: name for key, name in names.items() if any(key in figures for figures in rounds)}
    table = plain_table("after each round")
    table.add_column("round", style="bold")
    for name in measured.values():
        table.add_column(name, justify="right")
    for number, figures in enumerate(rounds, start=1):
        table.add_row(str(number), *(format_number(figures[key]) if key in figures else "-" for key in measured))
    return table


def task_table(summary: Mapping[str, Any]) -> Table:
    """Return a table with one row per task and one column per stage: main metric and, if known, its standard error."""
    stages = _present_stages(summary)
    table = plain_table("tasks")
    table.add_column("task", style="bold", overflow="fold")
    table.add_column("metric", overflow="fold")
    for name in stages:
        table.add_column(name, justify="right")
    for task, metric in main_metrics(summary):
        cells = []
        for stage in stages.values():
            value, error = (
                find_figure(stage, ("tasks", task, metric)),
                find_figure(stage, ("tasks", task, f"{metric}_stderr")),
            )
            spread = f" ±{format_number(error)}" if value is not None and error is not None else ""
            cells.append("-" if value is None else format_number(value) + spread)
        table.add_row(task, metric, *cells)
    return table


def published_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return a table for each paper whose tasks were run: the mean of each stage, then the published rows."""
    tables = []
    for title, headings, rows in beside_published.tables(summary):
        table = plain_table(title)
        for index, heading in enumerate(headings):
            words = index == 0 or heading == "source"
            table.add_column(heading, justify="left" if words else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def ratios_table(summary: Mapping[str, Any]) -> Table:
    """Return a table of a run's ratios with their meanings, then parameters and seconds."""
    meanings = {
        "memory": f"bytes {'on disk' if summary.get('bytes_on_disk') else 'of weights'}, compressed / original",
        "routed_expert_parameters": "retained / original",
        "prefill_speedup": "prefill, compressed / original",
        "decode_speedup": "decode, compressed / original",
        "refit_gap_closed": "share of the added loss that the refit removes, before any training",
        "gap_closed": "share of the added loss that all stages remove",
    }
    table = plain_table("ratios, sizes, times")
    table.add_column("figure", style="bold")
    table.add_column("value", justify="right")
    table.add_column("meaning", style="dim")
    for name, value in summary.get("ratios", {}).items():
        shown = f"{value:.2f}x" if name.endswith("speedup") else f"{value:z.4f}"
        table.add_row(name, shown, meanings.get(name, ""))
    for name, values in summary.get("parameters", {}).items():
        if "compressed" in values and "original" in values:
            table.add_row(f"{name} parameters", f"{values['compressed']:,}", f"of {values['original']:,}")
        elif "original" in values:
            table.add_row(f"{name} parameters", f"{values['original']:,}", "")
    for name, value in summary.get("seconds", {}).items():
        if value < 0.05:
            continue
        table.add_row(f"seconds: {name}", f"{value:.1f}", "")
    return table


def format_number(value: float) -> str:
    """Return a number with about four digits, thousands separators, and an exponent only below 0.001; never -0."""
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    digits = 4 if abs(value) < 1 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{value:z,.{digits}f}"


def _console() -> Console:
    # A file or a pipe has no width, so tables are printed at a fixed width.
    return Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)


def _cell(value: Any, original: Any, form: Any, path: tuple[str, ...]) -> str:
    if value is None:
        return ""
    # The original and a divergence from it have no ratio.
    if not original or value is original or path[-1] == "kl_to_original":
        return str(form(value))
    return f"{form(value)}\n[dim]{value / original:.2f}x[/dim]"


def main_metrics(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (task, main metric) for every task of any stage."""
    main: dict[str, str] = {}
    for stage in _present_stages(summary).values():
        for task, metrics in stage.get("tasks", {}).items():
            names = [name for name in metrics if not name.endswith("_stderr")]
            best = next((name for name in MAIN_METRICS if name in names), names[0] if names else None)
            if best is not None:
                main.setdefault(task, best)
    return list(main.items())


def _present_stages(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    stages = summary.get("stages", {})
    return {name: stages[name] for name in STAGES if name in stages}


def find_figure(values: Any, path: Sequence[str]) -> Any:
    """Return the value at a path of keys in nested mappings; None if a key is missing."""
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return None
        values = values[key]
    return values


def plain_table(title: str) -> Table:
    """Return an empty table in the style that all tables share."""
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False
    )
