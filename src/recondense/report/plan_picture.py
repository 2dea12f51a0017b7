"""Pictures of a plan: the outcome of every layer and expert."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recondense.errors import UserError
from recondense.report.expert_outcomes import OUTCOMES, Outcome, outcomes_of
from recondense.report.figures import SCALE, save_figure, start_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

# With 50 colours or more, matplotlib embeds the colour bar in the SVG as a bitmap.
HEAT_COLOURS = 48
MOST_NUMBERED = 24  # maximum number of experts per layer for which the axis numbers each of them
HATCHES = {"dropped": "xxx", "removed": "///", "skipped": "---"}


def draw_plan(plan: Mapping[str, Any], num_experts: int, layers: Sequence[int], path: Path) -> Path:
    """Draw a plan: its searches (`draw_searches`) if it only condenses, else the outcomes (`draw_outcomes`).

    Args:
        plan: `Plan.to_dict()`, with operations.
        num_experts: routed experts per layer of the uncompressed model.
        layers: MoE layers of the uncompressed model.
        path: the file; SVG if its name ends in .svg, else PNG.

    Returns:
        `path`.
    """
    kinds = {operation["kind"] for operation in plan["operations"]} - {"refit"}
    return draw_searches(plan, path) if kinds == {"condense"} else draw_outcomes(plan, num_experts, layers, path)


# ---------------------------------------------------------------------------------------------------- condensed layers


def draw_searches(plan: Mapping[str, Any], path: Path) -> Path:
    """Draw the retained experts, the routing weights of all experts, and the divergence after each greedy step.

    Left: the order in which the layers were selected. Middle: one row per layer and one column per expert. The colour
    is the mean routing weight over all calibration tokens, and the numbers are the order in which the retained experts
    were selected. Right: the Jensen-Shannon divergence of the layer's output after each step, on a logarithmic axis.

    Args:
        plan: `Plan.to_dict()`; parts whose section of `search` is missing remain blank.
        path: the file; SVG if its name ends in .svg, else PNG.

    Returns:
        `path`.

    Raises:
        UserError: the plan condenses no layer, so there is nothing to draw.
    """
    operations = {op["layer"]: op for op in plan.get("operations", ()) if op.get("kind") == "condense"}
    if not operations:
        raise UserError("plan picture: the plan condenses no layer")
    evidence = plan.get("search", {})
    searches = [part.get("expert_search", {}) for part in evidence.get("rounds", [evidence])]
    search = {int(layer): record for part in searches for layer, record in part.items()}
    layers = sorted({*operations, *search})
    weights = {layer: search[layer].get("mean_routing_weight", []) for layer in layers if layer in search}
    used = [expert for op in operations.values() for expert in op["experts"]]
    num_experts = max([*(len(row) for row in weights.values()), *(expert + 1 for expert in used), 1])
    curves = {layer: _divergences(search[layer]) for layer in layers if layer in search}
    curves = {layer: curve for layer, curve in curves.items() if any(value > 0 for value in curve.values())}

    cell = min(0.36, max(0.24, 9.0 / num_experts))
    widths = [max(3.4, cell * num_experts), 3.4 if curves else 0.01]
    heights = [max(1.0, cell * len(layers)), 0.1]
    figure = start_figure(sum(widths) + 1.2, sum(heights) + 1.9)
    grid = figure.add_gridspec(2, 2, width_ratios=widths, height_ratios=heights)
    axes = figure.add_subplot(grid[0, 0])
    cells = _draw_experts(axes, layers, num_experts, weights, operations, min(8.0, 30 * cell))
    if cells is not None:
        bar = figure.colorbar(cells, cax=figure.add_subplot(grid[1, 0]), orientation="horizontal")
        bar.set_label("mean routing weight over all calibration tokens (colours by square root)", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    if curves:
        _draw_curves(figure, grid, layers, curves)
    name = evidence.get("rounds", [evidence])[0].get("method") or "plan"
    title = f"{name}: {len(operations)} of {len(layers)} MoE layers condensed"
    figure.suptitle(f"{title} ({plan['model']})" if plan.get("model") else title, fontsize=11)
    return save_figure(figure, path)


def _draw_experts(
    axes: Axes,
    layers: Sequence[int],
    num_experts: int,
    weights: Mapping[int, Sequence[float]],
    operations: Mapping[int, Mapping[str, Any]],
    font_size: float,
) -> ScalarMappable | None:
    """Draw the layers by experts; return the colours for a colour bar, or None if no routing weight is known."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    weights_LE = np.full((len(layers), num_experts), np.nan)
    for row, layer in enumerate(layers):
        values = weights.get(layer, [])
        weights_LE[row, : len(values)] = values
    known = weights_LE[np.isfinite(weights_LE)]
    top = float(known.max()) if known.size and known.max() > 0 else 1.0
    # A few experts have most of the weight, so on a linear scale all others would have the same colour.
    edges = np.arange(num_experts + 1) - 0.5, np.arange(len(layers) + 1) - 0.5
    colours = colormaps["cividis"].resampled(HEAT_COLOURS)
    cells = axes.pcolormesh(*edges, weights_LE, cmap=colours, norm=PowerNorm(0.5, 0.0, top))
    axes.set_ylim(len(layers) - 0.5, -0.5)
    for row, layer in enumerate(layers):
        for order, expert in enumerate(operations.get(layer, {}).get("experts", ()), start=1):
            weight = weights_LE[row, expert]
            dark = bool(np.isfinite(weight)) and (weight / top) ** 0.5 < 0.55
            _mark_retained(axes, expert, row, order, "white" if dark else "black", font_size)
    _number_experts(axes, num_experts, font_size)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=font_size)
    _mark_order(axes, layers, list(operations), font_size)
    return cells if known.size else None


def _mark_retained(axes: Axes, expert: int, row: int, order: int, colour: str, font_size: float) -> None:
    """Draw a frame around a retained expert, with its place in the order of selection."""
    from matplotlib.patches import Rectangle

    box = (expert - 0.43, row - 0.43), 0.86, 0.86
    axes.add_patch(Rectangle(*box, fill=False, edgecolor=colour, linewidth=1.2))
    style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": font_size, "fontweight": "bold"}
    axes.text(expert, row, str(order), color=colour, **style)


def _number_experts(axes: Axes, num_experts: int, font_size: float) -> None:
    axes.set_xticks(range(0, num_experts, 1 if num_experts <= MOST_NUMBERED else 5))
    axes.tick_params(axis="x", labelsize=font_size, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xlabel("routed experts (numbered: kept, in the order of selection)", fontsize=9)
    axes.xaxis.set_label_position("top")


def _mark_order(axes: Axes, layers: Sequence[int], selected: Sequence[int], font_size: float) -> None:
    """Write the place of each layer in the order of selection on the left."""
    centred: dict[str, Any] = {"textcoords": "offset points", "ha": "center"}
    for text, offset in (("order", -33), ("layer", -10)):
        axes.annotate(text, (0, 1), xytext=(offset, 3), xycoords="axes fraction", fontsize=7, va="bottom", **centred)
    order = {layer: place for place, layer in enumerate(selected, start=1)}
    for row, layer in enumerate(layers):
        if layer in order:
            axes.annotate(
                str(order[layer]),
                (0, row),
                xytext=(-33, 0),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=font_size,
                bbox={"boxstyle": "circle,pad=0.2", "facecolor": "#F3C8A5", "edgecolor": "none"},
                **centred,
            )


def _draw_curves(figure: Figure, grid: Any, layers: Sequence[int], curves: Mapping[int, Mapping[int, float]]) -> None:
    """Draw the divergences on the right, and below them the legend of their markers."""
    side = figure.add_subplot(grid[0, 1])
    _draw_divergences(side, layers, curves)
    below = figure.add_subplot(grid[1, 1])
    below.axis("off")
    below.legend(
        *side.get_legend_handles_labels(),
        title="routed experts kept beside the shared ones",
        title_fontsize=8,
        fontsize=7,
        frameon=False,
        loc="center",
        ncols=9,
        columnspacing=0.7,
        handletextpad=0.0,
    )


def _draw_divergences(axes: Axes, layers: Sequence[int], curves: Mapping[int, Mapping[int, float]]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullFormatter

    last = max(max(curve) for curve in curves.values())
    palette = colormaps[SCALE]
    for row, layer in enumerate(layers):
        shown = [value for value in curves.get(layer, {}).values() if value > 0]
        if shown:
            axes.plot([min(shown), max(shown)], [row, row], color="#bbbbbb", linewidth=1, zorder=1)
    for step in range(last + 1):
        points = [(curve[step], row) for row, layer in enumerate(layers) if (curve := curves.get(layer, {})).get(step)]
        if points:
            axes.scatter(
                [value for value, _ in points],
                [row for _, row in points],
                s=26,
                color=palette(0.92 * (1 - step / max(last, 1))),
                marker="s" if step == 0 else "o",
                edgecolor="black",
                linewidth=0.4,
                label=str(step),
                zorder=2,
            )
    axes.set_xscale("log")
    values = [value for curve in curves.values() for value in curve.values() if value > 0]
    if math.log10(max(values) / min(values)) < 1:
        axes.set_xlim(10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values) * 1.0001)))
    axes.xaxis.set_major_locator(LogLocator(base=10, numticks=6))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_yticks(range(len(layers)))
    axes.set_yticklabels([])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="both", alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelsize=7, top=True, labeltop=True, bottom=False, labelbottom=False, which="both")
    axes.set_xlabel("Jensen-Shannon divergence after each step (nats)", fontsize=9)
    axes.xaxis.set_label_position("top")


def _divergences(record: Mapping[str, Any]) -> dict[int, float]:
    """Return the divergence by number of retained routed experts; 0 stands for only the shared experts."""
    curve = {step: float(value) for step, value in enumerate(record.get("js", ()), start=1)}
    if record.get("js_shared_only") is not None:
        curve[0] = float(record["js_shared_only"])
    return dict(sorted(curve.items()))


# ------------------------------------------------------------------------------------------------------- any operation


def draw_outcomes(plan: Mapping[str, Any], num_experts: int, layers: Sequence[int], path: Path) -> Path:
    """Draw the outcome of each expert in each layer: dropped, merged (its group), condensed, narrowed or factorized.

    Super experts have a bold frame.

    Args:
        plan: `Plan.to_dict()`.
        num_experts: routed experts per layer of the uncompressed model.
        layers: MoE layers of the uncompressed model.
        path: the file; SVG if its name ends in .svg, else PNG.

    Returns:
        `path`.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    rows = [outcomes_of(layer, plan["operations"], num_experts) for layer in layers]
    ranks = [rank for row in rows for kind, rank in row if kind == "factorized" and rank is not None]
    cell = min(0.4, max(0.2, 9.0 / num_experts))
    width = max(7.4, cell * num_experts + (2.2 if ranks else 1.2))  # 7.4 inches fit the legend's three columns
    figure = start_figure(width, max(2.6, cell * len(layers) + 1.9))
    axes = figure.add_subplot()
    norm = Normalize(min(ranks, default=0), max([*ranks, min(ranks, default=0) + 1]))
    for place, outcomes in enumerate(rows):
        for expert, outcome in enumerate(outcomes):
            _draw_outcome(axes, expert, place, outcome, norm, min(7.0, 22 * cell))
    axes.set_xlim(-0.6, num_experts - 0.4)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xticks(range(0, num_experts, 1 if num_experts <= MOST_NUMBERED else 5))
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.tick_params(labelsize=7, length=0)
    axes.set_xlabel("routed expert", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    handles = [*_legend({kind for row in rows for kind, _ in row}), *_frame_super_experts(axes, plan, layers)]
    if handles:
        figure.legend(handles=handles, frameon=False, fontsize=7, ncols=3, loc="outside lower center")
    if ranks:
        ticks = MaxNLocator(integer=True)
        bar = figure.colorbar(ScalarMappable(norm, SCALE), ax=axes, shrink=0.8, pad=0.02, ticks=ticks)
        bar.set_label("rank of a factorized expert", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    axes.set_title(f"outcome of each expert of {plan.get('model') or 'the model'}", fontsize=10)
    return save_figure(figure, path)


def _frame_super_experts(axes: Axes, plan: Mapping[str, Any], layers: Sequence[int]) -> list[Any]:
    """Draw a bold frame around every super expert, and return its entry of the legend; empty if there are none."""
    from matplotlib.patches import Patch, Rectangle

    named = plan.get("search", {}).get("super_experts", {}).get("largest_outputs", {})
    for row, layer in enumerate(layers):
        for expert in map(int, named.get(str(layer), ())):
            axes.add_patch(Rectangle((expert - 0.46, row - 0.46), 0.92, 0.92, fill=False, linewidth=2, zorder=3))
    return [Patch(fill=False, linewidth=2, label="super expert")] if named else []


def _legend(kinds: set[str]) -> Iterator[Any]:
    from matplotlib.patches import Patch

    for kind, (colour, words) in OUTCOMES.items():
        if kind in kinds:
            yield Patch(facecolor=colour, edgecolor="#999999", hatch=HATCHES.get(kind), label=words)


def _draw_outcome(axes: Axes, expert: int, row: int, outcome: Outcome, norm: Any, font_size: float) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    kind, number = outcome
    factorized = kind == "factorized"
    colour: Any = colormaps[SCALE](norm(number)) if factorized else OUTCOMES[kind][0]
    box: dict[str, Any] = {"facecolor": colour, "edgecolor": "#BBBBBB", "linewidth": 0.5}
    if kind in HATCHES:
        box["hatch"] = HATCHES[kind]
    axes.add_patch(Rectangle((expert - 0.46, row - 0.46), 0.92, 0.92, **box))
    if number is not None:
        dark = factorized and norm(number) < 0.6
        text: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": font_size}
        axes.text(expert, row, str(number), color="white" if dark else "black", **text)
