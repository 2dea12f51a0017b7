"""What a run found, as pictures: a plan, and a sweep. Colours are told apart without colour vision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recondense.errors import UserError
from recondense.report.figures import save_figure, start_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable

# The colour bar of 50 colours or more would be an image inside of an SVG.
HEAT_COLOURS = 48
# Okabe and Ito's colours for lines; marks differ in shape as well.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STAGE_MARKS = ("o", "s", "^", "D", "v", "P")


def plan_picture(plan: Mapping[str, Any], path: Path) -> Path:
    """Draw a plan: which experts stay, how much the router used each, and what each greedy step brought.

    Left, in which order layers were chosen. Middle, layers by experts: colour is the mean routing weight over all
    calibration tokens, numbers are the order in which kept experts were chosen. Right, the Jensen-Shannon divergence of
    the layer's output after each step, on a logarithmic axis.

    Args:
        plan: `Plan.to_dict()`; sections of its `search` that are missing are left blank.
        path: the PNG file.

    Returns:
        `path`.

    Raises:
        UserError: the plan changes nothing, so there is nothing to draw.
    """
    operations = {op["layer"]: op for op in plan.get("operations", ()) if op.get("kind") == "condense"}
    if not operations:
        raise UserError("plan picture: the plan condenses no layer")
    search = {int(layer): found for layer, found in plan.get("search", {}).get("expert_search", {}).items()}
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
    cells = _draw_experts(axes, layers, num_experts, weights, operations, 30 * cell)
    if cells is not None:
        bar = figure.colorbar(cells, cax=figure.add_subplot(grid[1, 0]), orientation="horizontal")
        bar.set_label("mean routing weight over all calibration tokens (colours by square root)", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    if curves:
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
    name = plan.get("search", {}).get("method") or "plan"
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
    """The map of experts; returns its colours when any routing weight is known, for a colour bar."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Rectangle

    font_size = min(8.0, font_size)
    picture = np.full((len(layers), num_experts), np.nan)
    for row, layer in enumerate(layers):
        values = weights.get(layer, [])
        picture[row, : len(values)] = values
    known = picture[np.isfinite(picture)]
    top = float(known.max()) if known.size and known.max() > 0 else 1.0
    # A few experts take most of the weight: on a linear scale all others would be one colour.
    edges = np.arange(num_experts + 1) - 0.5, np.arange(len(layers) + 1) - 0.5
    colours = colormaps["cividis"].resampled(HEAT_COLOURS)
    cells = axes.pcolormesh(*edges, picture, cmap=colours, norm=PowerNorm(0.5, 0.0, top))
    axes.set_ylim(len(layers) - 0.5, -0.5)
    for row, layer in enumerate(layers):
        for order, expert in enumerate(operations.get(layer, {}).get("experts", ()), start=1):
            value = picture[row, expert]
            colour = "white" if np.isfinite(value) and (value / top) ** 0.5 < 0.55 else "black"
            box = (expert - 0.43, row - 0.43), 0.86, 0.86
            axes.add_patch(Rectangle(*box, fill=False, edgecolor=colour, linewidth=1.2))
            style: dict[str, Any] = {
                "ha": "center",
                "va": "center_baseline",
                "fontsize": font_size,
                "fontweight": "bold",
            }
            axes.text(expert, row, str(order), color=colour, **style)
    axes.set_xticks(range(0, num_experts, 1 if num_experts <= 24 else 5))
    axes.tick_params(axis="x", labelsize=font_size, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xlabel("routed experts (numbered: kept, in the order of selection)", fontsize=9)
    axes.xaxis.set_label_position("top")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=font_size)
    for text, offset in (("order", -33), ("layer", -10)):
        place: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "ha": "center",
            "va": "bottom",
        }
        axes.annotate(text, (0, 1), xytext=(offset, 3), fontsize=7, **place)
    chosen = {layer: order for order, layer in enumerate(operations, start=1)}
    for row, layer in enumerate(layers):
        if layer in chosen:
            axes.annotate(
                str(chosen[layer]),
                (0, row),
                xycoords=("axes fraction", "data"),
                xytext=(-33, 0),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=font_size,
                bbox={"boxstyle": "circle,pad=0.2", "facecolor": "#F3C8A5", "edgecolor": "none"},
            )
    return cells if known.size else None


def _draw_divergences(axes: Axes, layers: Sequence[int], curves: Mapping[int, Mapping[int, float]]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullFormatter

    last = max(max(curve) for curve in curves.values())
    palette = colormaps["viridis"]
    colours = {step: palette(0.92 * (1 - step / max(last, 1))) for step in range(last + 1)}
    for row, layer in enumerate(layers):
        shown = [value for value in curves.get(layer, {}).values() if value > 0]
        if shown:
            axes.plot([min(shown), max(shown)], [row, row], color="#bbbbbb", linewidth=1, zorder=1)
    for step in range(last + 1):
        found = [(curve[step], row) for row, layer in enumerate(layers) if (curve := curves.get(layer, {})).get(step)]
        if found:
            axes.scatter(
                [value for value, _ in found],
                [row for _, row in found],
                s=26,
                color=colours[step],
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


def _divergences(found: Mapping[str, Any]) -> dict[int, float]:
    """Number of routed experts kept -> divergence; 0 is the shared experts alone."""
    curve = {step: float(value) for step, value in enumerate(found.get("js", ()), start=1)}
    if found.get("js_shared_only") is not None:
        curve[0] = float(found["js_shared_only"])
    return dict(sorted(curve.items()))
