"""`plan_only=true`: the sizes of the compressed model, written to summary.json and printed without a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PretrainedConfig, PreTrainedModel

from recondense import processes
from recondense.config.rounds import rounds_of
from recondense.config.schema import Config
from recondense.files import write_aside
from recondense.full_disk import format_bytes
from recondense.methods.step import Step
from recondense.models import families, model_classes
from recondense.models.quantized import byte_counter, quantization
from recondense.operations import Drop, Factorize, Narrow
from recondense.plan import Plan
from recondense.report import tables
from recondense.report.beside_published import Setting, distance, is_same, setting_of
from recondense.report.published import CDMOE, PAPER_TITLES, Result, find, published_model
from recondense.report.summary import Summary, ratios
from recondense.report.tables import plan_line, print_tables
from recondense.run import run_folder
from recondense.run.model_checks import planned_config
from recondense.run.refits import plan_refits
from recondense.run.resolved_run import Run
from recondense.run.rounds import steps_of_rounds
from recondense.run.sizes import LayerSize, Sizes, compare

GIB = 2**30


@dataclass(frozen=True)
class Published:
    """Published results beside the sizes of a run.

    Args:
        setting: setting of the run, in the terms of a published row.
        sizes: sizes of the run.
        rows: results of the run's model and method, with the sizes of the same settings; None if no settings of the
            method reproduce them.
    """

    setting: Setting
    sizes: Sizes
    rows: Sequence[tuple[Result, Sizes | None]]


def beside_published(
    model: PreTrainedModel, steps: Sequence[Step], sizes: Sizes, operations: Mapping[str, Mapping[str, float]]
) -> Published | None:
    """Return the published results of a model and method; None if there are none.

    Args:
        model: the model on the meta device, uncompressed.
        steps: steps of the command.
        sizes: sizes of the command.
        operations: its operations, counted.
    """
    facts = families.facts(model.config)
    known = published_model(facts.model_type, facts.hidden_size, facts.num_layers, facts.num_experts)
    groupings = [step.grouping for step in steps if hasattr(step, "grouping")]
    setting = setting_of(operations, 1 - sizes.after.routed_experts / sizes.before.routed_experts, groupings)
    if known is None or setting.method in (None, "original"):
        return None
    rows: dict[tuple[Any, ...], Result] = {}
    for row in find(known.name, method=setting.method):
        if row.settings is not None or not row.fine_tuned:
            rows.setdefault(tuple((row.settings or {"mean": row.mean}).values()), row)  # some occur in two tables
    order = lambda row: (-(row.num_experts or 0), row.num_layers or 0, row.removed_expert_ratio or 0)  # noqa: E731
    listed = [
        (row, compare(model, [_with(step, row.settings) for step in steps]) if row.settings else None)
        for row in sorted(rows.values(), key=order)
    ]
    return Published(setting, sizes, listed) if listed else None


def _with(step: Any, settings: Mapping[str, Any]) -> Any:
    """Return a step of the same class with the given settings, without those that the class does not have."""
    return type(step)(**{field.name: settings[field.name] for field in fields(step) if field.name in settings})


def print_sizes(run: Run) -> None:
    """Write the sizes of a run to summary.json and print them. There are no stages, because nothing is measured.

    Raises:
        ConfigError: another process is working in the folder.
        UserError: the method cannot meet its budget, or the bytes of the quantization format are unknown.
    """
    if not processes.is_first_to_start():
        return
    folder = run.config.run_folder()
    with run_folder.lock_folder(folder, resumes=False):
        run_folder.begin(run.config, folder)
        _write_and_print(run, folder)


def _write_and_print(run: Run, folder: Path) -> None:
    config, steps = run.config, run.steps
    planned = planned_config(config.model, plan_only=True)
    dtype = weights_dtype(planned, config.model.dtype)
    quantized = quantization(planned) if config.model.dtype == "auto" else {}
    model = model_classes.on_meta(planned, dtype)
    in_rounds = steps_of_rounds(config.method, steps, model)
    sizes = compare(model, in_rounds, byte_counter(model, quantized))
    result = _summary(config, model, sizes)
    write_aside(folder / "summary.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    published = beside_published(model, steps, sizes, result["operations"])
    own_tables = [size_table(result, bool(quantized), dtype), layer_table(sizes)]
    print_tables([*own_tables, *([published_table(published)] if published else [])])
    print(f"\nplan: {plan_line(result['operations'])}")
    if (rounds := rounds_of(config.method)) > 1:
        print(f"rounds: {rounds}; these are the sizes after the last one")
    for note in _notes(steps, sizes, quantized, dtype, planned):
        print(note)
    print(f"\nsizes: {folder / 'summary.json'}")


def weights_dtype(planned: PretrainedConfig, dtype: str) -> torch.dtype:
    """Return the data type of a model's weights.

    Args:
        planned: config of the model.
        dtype: name of a type, or auto for the type in the config (float32 if there is none).
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    return planned.dtype if isinstance(planned.dtype, torch.dtype) else torch.float32


def _summary(config: Config, model: Any, sizes: Sizes) -> dict[str, Any]:
    """Return the summary of a run without measured figures, marked by its key `plan_only`."""
    operations = (*sizes.operations, *plan_refits(sizes.operations, config.method.get("refit", False)))
    sides = {"original": sizes.before, "compressed": sizes.after}
    counted = {
        name: {"total": size.total, "routed_experts": size.routed_experts, "active_per_token": size.active}
        for name, size in sides.items()
    }
    summary = Summary.of_plan(config, config.recovery.objective, Plan("", operations), counted, model, {})
    summary.plan_only = True
    summary.weights_bytes = {name: size.weights_bytes for name, size in sides.items()}
    memory = sizes.after.weights_bytes / sizes.before.weights_bytes
    summary.ratios = {"memory": memory, **ratios({}, counted)}
    return summary.to_dict()


def _notes(
    steps: Sequence[Step],
    sizes: Sizes,
    quantized: dict[str, Any],
    dtype: torch.dtype,
    planned: PretrainedConfig,
) -> list[str]:
    """Return notes on the figures."""
    notes = []
    operations = [operation for operation in sizes.operations if not isinstance(operation, Factorize | Narrow)]
    listed = any(not isinstance(getattr(step, "num_layers", 1), int | str) for step in steps)
    moe_layers = set(families.facts(planned).moe_layers)
    selects_layers = bool(operations) and not {operation.layer for operation in operations} >= moe_layers
    selects_experts = any(getattr(operation, "experts", not isinstance(operation, Drop)) for operation in operations)
    words = ["layers"] * (selects_layers and not listed) + ["experts"] * selects_experts
    if words:
        notes.append(f"which {' and '.join(words)}: decided by the search; these sizes assume the first ones")
    notes += [f"also decided by the search: {step.left_open}" for step in steps if step.left_open]
    if quantized:
        name = str(dtype).removeprefix("torch.")
        notes.append(
            f"the checkpoint is stored in {quantized['quant_method']} and dequantized on loading: the sizes before are "
            f"bytes on disk, and those after are in {name}; with model.dtype={name}, both are in {name} and the ratio "
            f"is {sizes.after.total / sizes.before.total:.4f}"
        )
    elif not isinstance(planned.dtype, torch.dtype) and dtype == torch.float32:
        notes.append("the config has no data type for the weights, so the sizes assume float32")
    return notes


def size_table(result: dict[str, Any], quantized: bool, dtype: torch.dtype) -> Table:
    """Return a table of parameters and bytes: before, after, and their ratio.

    Args:
        result: content of summary.json.
        quantized: whether the original is stored in a quantized format.
        dtype: data type of the compressed weights.
    """
    table = tables.plain_table(f"{result['model']}: {result['method']}, computed from shapes")
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="right" if name else "left", style=None if name else "bold")
    names = {
        "total": "parameters",
        "routed_experts": "of routed experts",
        "active_per_token": "active per token",
    }
    for key, name in names.items():
        before, after = (result["parameters"][key][side] for side in ("original", "compressed"))
        table.add_row(name, f"{before:,}", f"{after:,}", _ratio(after, before))
    before, after = result["weights_bytes"]["original"], result["weights_bytes"]["compressed"]
    name = "memory (weights)" if not quantized else "bytes as stored"
    table.add_row(name, format_bytes(before), format_bytes(after), _ratio(after, before))
    if quantized:  # dequantized weights need more bytes even if nothing is compressed
        size = dtype.itemsize
        before, after = (result["parameters"]["total"][side] * size for side in ("original", "compressed"))
        words = f"memory, both {str(dtype).removeprefix('torch.')}"
        table.add_row(words, format_bytes(before), format_bytes(after), _ratio(after, before))
    return table


def layer_table(sizes: Sizes) -> Table:
    """Return a table with one row per group of equal layers: outcome, experts, ranks, widths and bytes of one layer."""
    table = tables.plain_table("decoder layers")
    table.add_column("layers", style="bold", overflow="fold")
    table.add_column("outcome")
    has_widths = any(size.widths is not None for size in sizes.layers.values())
    for name in ("experts", "ranks", *["width"] * has_widths, "bytes per layer", "ratio"):
        table.add_column(name, justify="right")
    groups: dict[LayerSize, list[int]] = {}
    for layer, size in sizes.layers.items():
        groups.setdefault(size, []).append(layer)
    for size, layers in groups.items():
        table.add_row(
            f"{ranges(layers)} ({len(layers)})",
            size.outcome or ("unchanged" if size.experts_before is not None else "dense, unchanged"),
            _experts(size),
            _from_to(size.ranks),
            *[_from_to(size.widths)] * has_widths,
            f"{format_bytes(size.bytes_before)} -> {format_bytes(size.bytes_after)}",
            _ratio(size.bytes_after, size.bytes_before),
        )
    return table


def _from_to(numbers: tuple[int, int] | None) -> str:
    return "" if numbers is None else "-".join(map(str, sorted({*numbers})))


def published_table(published: Published) -> Table:
    """Return a table of this run and the published rows, with what the settings of each row give.

    The last column marks the rows that have the run's settings, or the nearest ones.
    """
    rows = published.rows
    condensing = rows[0][0].paper == CDMOE
    figure = "memory, compressed / original" if condensing else "removed parameters of routed experts"
    table = tables.plain_table(f"{PAPER_TITLES[rows[0][0].paper]}: {figure}")
    table.add_column("setting", style="bold")
    names = (
        ("published", "mean score", "fine-tuned") if condensing else ("published", "GiB", "GB published", "fine-tuned")
    )
    for name in ("from shapes", *names):
        table.add_column(name, justify="right")
    table.add_column("")
    table.add_row("this run", *_cells(published.sizes, condensing, ""))
    exact = any(is_same(row, published.setting) for row, _ in rows)
    best = min((distance(row, published.setting) for row, _ in rows), default=None)
    for row, sizes in rows:
        chosen = is_same(row, published.setting) if exact else distance(row, published.setting) == best
        stated = f"{row.memory_ratio:.3f}" if condensing else f"{row.removed_expert_ratio:.2%}"
        cells = _cells(sizes, condensing, stated, row.memory_gb)
        mark = "as this run" if exact else "nearest"
        setting = replace(row, fine_tuned=False).setting  # a column says so
        table.add_row(setting, *cells, *_means(row, condensing), mark if chosen else "")
    return table


def _cells(sizes: Sizes | None, condensing: bool, stated: str, gigabytes: float | None = None) -> list[str]:
    """Return the figures of a paper from shapes, and as stated: the memory, or the removed experts and the size."""
    if condensing:
        ratio = sizes and sizes.after.weights_bytes / sizes.before.weights_bytes
        return [f"{ratio:.4f}" if ratio else "", stated]
    cut = f"{1 - sizes.after.routed_experts / sizes.before.routed_experts:.2%}" if sizes else ""
    size = f"{sizes.after.weights_bytes / GIB:.2f}" if sizes else ""
    return [cut, stated, size, "" if gigabytes is None else f"{gigabytes:.2f}"]


def _means(row: Result, condensing: bool) -> list[str]:
    """Return the mean score of a row and, for CD-MoE, that of the same setting after the paper's recovery."""
    if not condensing:
        return [f"{row.mean}"]
    tuned = find(row.model, method=row.method, num_layers=row.num_layers, num_experts=row.num_experts, fine_tuned=True)
    return [f"{row.mean}", f"{tuned[0].mean}" if tuned else ""]


def ranges(layers: Sequence[int]) -> str:
    """Return ascending indices as text with ranges, such as "0, 3-9"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _experts(size: LayerSize) -> str:
    if size.experts_before is None:
        return ""
    if not size.outcome:
        return f"{size.experts_before}"
    active = " always active" if size.always_active and size.experts_after else ""
    return f"{size.experts_before} -> {size.experts_after}{active}"


def _ratio(after: float, before: float) -> str:
    return f"{after / before:.4f}" if before else ""
