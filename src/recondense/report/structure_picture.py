"""What a plan makes of every layer and expert, as one picture (PNG): for plans that do more than condense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recondense.report.figures import save_figure, start_figure
from recondense.report.plan_picture import plan_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HATCHES = {"dropped": "xxx", "removed": "///", "skipped": "---"}
# Okabe and Ito's colours, and the words of the legend.
KINDS = {
    "kept": ("#DDDDDD", "kept"),
    "dense": ("#CC79A7", "kept dense in a factorized layer"),
    "condensed": ("#E69F00", "condensed: always active; number: order of selection"),
    "dropped": ("white", "dropped"),
    "removed": ("white", "feed-forward block removed"),
    "skipped": ("white", "whole layer removed"),
    "merged": ("#56B4E9", "merged; number: its group"),
}
RANKS = "viridis"


def picture_of(plan: Mapping[str, Any], num_experts: int, layers: Sequence[int], path: Path) -> Path:
    """The picture that suits a plan: of the searches where it only condenses, of layers and experts otherwise.

    Args:
        plan: `Plan.to_dict()`, with operations.
        num_experts, layers: routed experts a layer and the MoE layers of the uncompressed model.
        path: the PNG file.

    Returns:
        `path`.
    """
    kinds = {operation["kind"] for operation in plan["operations"]} - {"refit"}
    return plan_picture(plan, path) if kinds == {"condense"} else structure_picture(plan, num_experts, layers, path)


def structure_picture(plan: Mapping[str, Any], num_experts: int, layers: Sequence[int], path: Path) -> Path:
    """Draw layers by experts: what was dropped, merged into which group, condensed, factorized at which rank.

    Args:
        plan: `Plan.to_dict()`.
        num_experts: E of the uncompressed model.
        layers: its MoE layers.
        path: the PNG file.

    Returns:
        `path`.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    cells = {layer: _layer(layer, plan["operations"], num_experts) for layer in layers}
    ranks = [rank for row in cells.values() for kind, rank in row if kind == "factorized" and rank is not None]
    cell = min(0.4, max(0.2, 9.0 / num_experts))
    width = max(7.4, cell * num_experts + (2.2 if ranks else 1.2))  # the legend's three columns
    figure = start_figure(width, max(2.6, cell * len(layers) + 1.9))
    axes = figure.add_subplot()
    norm = Normalize(min(ranks, default=0), max([*ranks, min(ranks, default=0) + 1]))
    seen = set()
    for row, layer in enumerate(layers):
        for expert, (kind, detail) in enumerate(cells[layer]):
            seen.add(kind)
            _draw(axes, expert, row, kind, detail, norm, 22 * cell)
    axes.set_xlim(-0.6, num_experts - 0.4)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xticks(range(0, num_experts, 1 if num_experts <= 24 else 5))
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.tick_params(labelsize=7, length=0)
    axes.set_xlabel("routed expert", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    handles = [
        Patch(facecolor=colour, edgecolor="#999999", hatch=HATCHES.get(kind), label=words)
        for kind, (colour, words) in KINDS.items()
        if kind in seen
    ]
    if handles:
        figure.legend(handles=handles, frameon=False, fontsize=7, ncols=3, loc="outside lower center")
    if ranks:
        bar = figure.colorbar(
            ScalarMappable(norm, RANKS), ax=axes, shrink=0.8, pad=0.02, ticks=MaxNLocator(integer=True)
        )
        bar.set_label("rank of a factorized expert", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    axes.set_title(f"what the plan makes of {plan.get('model') or 'the model'}", fontsize=10)
    return save_figure(figure, path)


def _draw(axes: Axes, expert: int, row: int, kind: str, detail: int | None, norm: Any, font_size: float) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    factorized = kind == "factorized"
    colour: Any = colormaps[RANKS](norm(detail)) if factorized else KINDS[kind][0]
    box: dict[str, Any] = {"facecolor": colour, "edgecolor": "#BBBBBB", "linewidth": 0.5}
    if kind in HATCHES:
        box["hatch"] = HATCHES[kind]
    axes.add_patch(Rectangle((expert - 0.46, row - 0.46), 0.92, 0.92, **box))
    if detail is not None:
        dark = factorized and norm(detail) < 0.6
        text: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": min(7.0, font_size)}
        axes.text(expert, row, str(detail), color="white" if dark else "black", **text)


def _layer(layer: int, operations: Sequence[Mapping[str, Any]], num_experts: int) -> list[tuple[str, int | None]]:
    """What becomes of each expert that a layer had at first, and a number to write on it."""
    found: list[tuple[str, int | None]] = [("kept", None)] * num_experts
    there: list[tuple[int, ...]] = [
        (expert,) for expert in range(num_experts)
    ]  # the experts that the next operation counts
    for operation in (each for each in operations if each["layer"] == layer):
        kind = operation["kind"]
        if kind == "drop":
            return [("removed" if operation["part"] == "moe" else "skipped", None)] * num_experts
        if kind == "prune":
            there = [there[index] for index in operation["retained"]]
            retained = {expert for each in there for expert in each}
            found = [each if expert in retained else ("dropped", None) for expert, each in enumerate(found)]
        elif kind == "condense":
            kept = {e: order for order, index in enumerate(operation["experts"], start=1) for e in there[index]}
            found = [("condensed", kept[e]) if e in kept else ("dropped", None) for e in range(num_experts)]
        elif kind == "merge":
            there = [tuple(expert for index in group for expert in there[index]) for group in operation["groups"]]
            for number, group in enumerate(there):
                for expert in group:
                    found[expert] = ("merged", number)
        elif kind == "factorize":
            for experts, rank in zip(there, operation["ranks"]["gate_proj"], strict=True):
                for expert in experts:
                    if rank is not None:
                        found[expert] = ("factorized", rank)
                    elif found[expert][0] == "kept":
                        found[expert] = ("dense", None)
    return found
