"""Pictures of a sweep: perplexity of its methods against bytes and speed, before and after recovery."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recondense.report.comparison import CONTROL, common_level, last_perplexity
from recondense.report.comparison_columns import STAGES
from recondense.report.figures import COLOURS, DASHES, MARKS, save_figure, start_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The lines of a method: (stage, style).
LINES = {"compressed_perplexity": ("compressed", "--"), "recovered_perplexity": ("recovered", "-")}


@dataclass(frozen=True)
class Axis:
    """A figure on an x-axis: its key in a row, its label, and the unit by which it is divided."""

    key: str
    label: str
    unit: float = 1.0

    @property
    def original(self) -> str:
        """The key of the same figure of the original."""
        return f"original_{self.key}"


BYTES = Axis("weights_bytes", "weights (MB)", 1e6)
PARAMETERS = Axis("total_parameters", "parameters (millions)", 1e6)
SPEED = Axis("decode_tokens_per_second", "decode speed (tokens/s)")


def draw_sweep(rows: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Draw perplexity against size, and against speed if it was measured.

    Each method has two lines: before recovery (dashed) and after it. They connect its runs in the order of their sizes.

    Args:
        rows: as for `sweep_table.sweep_table`. If no size in bytes was measured, the x-axis shows parameters.
        path: the file; SVG if its name ends in .svg, else PNG.

    Returns:
        `path`, or None if no run has both a size and a perplexity. In that case nothing is written.
    """
    size = BYTES if any(BYTES.key in row for row in rows) else PARAMETERS
    shown = [row for row in rows if size.key in row and any(key in row for key in LINES)]
    if not shown:
        return None
    shown.sort(key=lambda row: row[size.key])
    axes_of = [size, *([SPEED] if any(SPEED.key in row for row in shown) else [])]
    figure = start_figure(7.2 if len(axes_of) == 1 else 11.0, 4.8)
    panels = figure.subplots(1, len(axes_of), squeeze=False, sharey=True)[0]
    heights = [row[key] for row in shown for key in LINES if key in row]
    if max(heights) > 10 * min(heights) > 0:
        panels[0].set_yscale("log")
    for panel, axis in zip(panels, axes_of, strict=True):
        _draw_methods(panel, shown, axis)
        _mark_original(panel, rows, axis)
        panel.set_xlabel(axis.label)
        panel.margins(x=0.2, y=0.14)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("validation perplexity")
    names = _point_settings(shown)
    title = f"beside the points: {names[0]}" if len(names) == 1 else None
    panels[0].legend(frameon=False, fontsize=8, title=title, title_fontsize=8)
    figure.suptitle("perplexity against size" + (" and speed" if len(axes_of) > 1 else ""))
    return save_figure(figure, path)


def _draw_methods(panel: Axes, rows: Sequence[Mapping[str, Any]], axis: Axis) -> None:
    """Draw two lines per method, with the settings of each run beside its point."""
    for index, method in enumerate(dict.fromkeys(str(row.get("method", "")) for row in rows)):
        colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
        runs = [row for row in rows if str(row.get("method", "")) == method and axis.key in row]
        for key, (stage, line) in LINES.items():
            points = [(row[axis.key] / axis.unit, row[key]) for row in runs if key in row]
            if points:
                fill = colour if line == "-" else "white"
                label = f"{method}, {stage}"
                panel.plot(
                    *zip(*points, strict=True), line, color=colour, marker=mark, markerfacecolor=fill, label=label
                )
        _annotate(runs, axis, panel, _point_settings(rows), below=index % 2 == 1)


def _mark_original(panel: Axes, rows: Sequence[Mapping[str, Any]], axis: Axis) -> None:
    originals = {row["original_perplexity"] for row in rows if "original_perplexity" in row}
    if len(originals) != 1:  # runs on several models or texts have no common original
        return
    [perplexity] = originals
    panel.axhline(perplexity, color="#666666", linewidth=0.8, linestyle=":")
    places = [row[axis.original] for row in rows if axis.original in row]
    if places:  # the speed was measured again in each run
        place = statistics.median(places) / axis.unit
        panel.plot(place, perplexity, marker="*", markersize=12, color="black", linestyle="none", label="original")
    else:
        panel.plot([], [], color="#666666", linestyle=":", label="original")


def _point_settings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the settings that tell a method's runs apart; points of several seeds coincide."""
    names = dict.fromkeys(name for row in rows for name in row.get("settings", {}))
    return [name for name in names if name not in ("method", "seed")]


def _annotate(rows: Sequence[Mapping[str, Any]], axis: Axis, panel: Axes, names: Sequence[str], *, below: bool) -> None:
    """Label each run with its settings: with the value alone if there is one setting."""
    for row in rows:
        values = [row[key] for key in LINES if key in row]
        settings = {name: row["settings"][name] for name in names if name in row.get("settings", {})}
        if values and settings:
            short = len(names) == 1
            lines = (value if short else f"{name.rsplit('.', 1)[-1]}={value}" for name, value in settings.items())
            panel.annotate(
                "\n".join(lines),
                (row[axis.key] / axis.unit, min(values) if below else max(values)),
                xytext=(-5, -5) if below else (5, 5),
                textcoords="offset points",
                ha="right" if below else "left",
                va="top" if below else "bottom",
                fontsize=7,
                color="#333333",
            )


def draw_comparison(entries: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Draw perplexity against bytes, and below against speed if it was measured; one panel per stage.

    Each method has a line, which connects its entries in the order of their sizes. Bars are standard deviations.
    Horizontal lines show the original and the control (the original trained further).

    Args:
        entries: as returned by `comparison.by_seed`.
        path: the file; SVG if its name ends in .svg, else PNG.

    Returns:
        `path`, or None if no method compresses. In that case nothing is written.
    """
    shown = [entry for entry in entries if "weights_bytes" in entry and "compressed_perplexity" in entry]
    # Sorted by the last perplexity at the smaller sizes, so the legend has the order of the lines' left ends.
    ranked = sorted(shown, key=lambda entry: (entry["weights_bytes"][0] > _middle(shown), last_perplexity(entry)))
    methods = list(dict.fromkeys(entry["method"] for entry in ranked))
    if not methods:
        return None
    looks = {method: _look(index) for index, method in enumerate(sorted(methods))}
    stages = [stage for stage in STAGES if any(f"{stage}_perplexity" in entry for entry in shown)]
    axes_of = [BYTES, *([SPEED] if any(SPEED.key in entry for entry in shown) else [])]
    height = 4.8 if len(methods) <= 8 else 6.4
    figure = start_figure(4.0 * len(stages) + 1.9, height + (0.75 * height if len(axes_of) > 1 else 0))
    panels = figure.subplots(len(axes_of), len(stages), squeeze=False, sharex="row", sharey=True)
    original = common_level(entries, "original_perplexity")
    control = [entry for entry in entries if entry["method"] == CONTROL]
    shown.sort(key=lambda entry: entry["weights_bytes"][0])
    for row, axis in zip(panels, axes_of, strict=True):
        for panel, stage in zip(row, stages, strict=True):
            for method in methods:
                line = [entry for entry in shown if entry["method"] == method and f"{stage}_perplexity" in entry]
                _draw_line(panel, [entry for entry in line if axis.key in entry], axis, stage, looks[method])
            _draw_levels(panel, original, control if stage == "recovered" else [])
            panel.set_xlabel(axis.label)
            panel.margins(x=0.08)
            panel.tick_params(labelsize=8)
            panel.grid(alpha=0.25)
        row[0].set_ylabel("validation perplexity")
    for panel, stage in zip(panels[0], stages, strict=True):
        panel.set_title(STAGES[stage][1], fontsize=10)
    _stretch([row[0] for row in panels], [*shown, *control], original or min(last_perplexity(entry) for entry in shown))
    _draw_legend(figure, panels[0][-1], spread=any(entry["count"] > 1 for entry in entries))
    return save_figure(figure, path)


def _draw_legend(figure: Figure, axes: Axes, *, spread: bool) -> None:
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        title="± over seeds: bars, band" if spread else None,
        title_fontsize=7,
        loc="outside right center",
        frameon=False,
        fontsize=8,
    )


def _middle(entries: Sequence[Mapping[str, Any]]) -> float:
    sizes = [entry["weights_bytes"][0] for entry in entries]
    return (min(sizes) + max(sizes)) / 2 if sizes else 0.0


def _look(index: int) -> dict[str, Any]:
    """Return a combination of colour, marker and dashes that is unique among 21 methods."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "marker": MARKS[index % len(MARKS)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
        "markersize": 6.5,
        "linewidth": 1.3,
    }


def _draw_line(
    panel: Axes, entries: Sequence[Mapping[str, Any]], axis: Axis, stage: str, look: Mapping[str, Any]
) -> None:
    if not entries:
        return
    figures = [entry[f"{stage}_perplexity"] for entry in entries]
    panel.errorbar(
        [entry[axis.key][0] / axis.unit for entry in entries],
        [mean for mean, _ in figures],
        yerr=[deviation or 0.0 for _, deviation in figures],
        label=entries[0]["method"],
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


def _stretch(panels: Sequence[Axes], entries: Sequence[Mapping[str, Any]], original: float) -> None:
    """Make the shared y-axis linear near the original's perplexity and logarithmic above, if the range is large.

    On a purely logarithmic axis, one bad method would compress all good ones into a narrow band.
    """
    import numpy as np
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    keys = [f"{stage}_perplexity" for stage in STAGES]
    figures = [entry[key] for entry in entries for key in keys if key in entry]
    heights = [mean + sign * (deviation or 0.0) for mean, deviation in figures for sign in (-1, 1)]
    low, high = min([original, *heights]), max([original, *heights])
    if high <= 1.5 * low:
        return
    width = 0.02 * original
    forward = lambda value: np.arcsinh((np.asarray(value) - original) / width)  # noqa: E731
    inverse = lambda place: original + width * np.sinh(np.clip(place, -50, 50))  # noqa: E731
    axes = panels[0]  # the others share its scale
    axes.set_yscale("function", functions=(forward, inverse))
    margin = 0.04 * float(forward(high) - forward(low))
    axes.set_ylim(float(inverse(forward(low) - margin)), float(inverse(forward(high) + margin)))
    places = np.linspace(float(forward(low)), float(forward(high)), 10)
    step = float(places[1] - places[0])
    ticks = [_round(*(float(inverse(place + part * step)) for part in (-0.3, 0.0, 0.3))) for place in places]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    for panel in panels:
        panel.set_ylabel("validation perplexity (stretched near the original's)")


def _round(low: float, value: float, high: float) -> float:
    """Return a value rounded to the fewest digits that stay between two bounds."""
    for digits in range(1, 6):
        candidate = float(f"{value:.{digits}g}")
        if low <= candidate <= high:
            return candidate
    return value
