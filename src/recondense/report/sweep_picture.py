"""Pictures of a sweep: perplexity of its methods against bytes, before and after recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recondense.report.comparison import CONTROL, STAGES, common_level, last_perplexity
from recondense.report.figures import COLOURS, DASHES, MARKS, save_figure, start_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_sweep(rows: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Draw perplexity against size, with two lines per method: before recovery (dashed) and after it.

    Args:
        rows: as for `sweep_table.sweep_table`. If no size in bytes was measured, the x-axis shows parameters.
        path: the file; SVG if its name ends in .svg, else PNG.

    Returns:
        `path`, or None if no run has both a size and a perplexity. In that case nothing is written.
    """
    size = "weights_bytes" if any("weights_bytes" in row for row in rows) else "total_parameters"
    figure = start_figure(7.2, 4.8)
    axes = figure.add_subplot()
    heights: list[float] = []
    for index, method in enumerate(dict.fromkeys(str(row.get("method", "")) for row in rows)):
        colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
        for key, stage, line in (
            ("compressed_perplexity", "compressed", "--"),
            ("recovered_perplexity", "recovered", "-"),
        ):
            runs = [row for row in rows if str(row.get("method", "")) == method and size in row and key in row]
            runs.sort(key=lambda row: row[size])
            if runs:
                sizes, values = [row[size] / 1e6 for row in runs], [row[key] for row in runs]
                fill = colour if line == "-" else "white"
                label = f"{method}, {stage}"
                axes.plot(sizes, values, line, color=colour, marker=mark, markerfacecolor=fill, label=label)
                heights += values
        _annotate([row for row in rows if str(row.get("method", "")) == method], size, axes, below=index % 2 == 1)
    if not heights:
        return None
    if max(heights) > 10 * min(heights) > 0:
        axes.set_yscale("log")
    _mark_original(axes, rows)
    axes.set_xlabel("weights (MB)" if size == "weights_bytes" else "parameters (millions)")
    axes.set_ylabel("validation perplexity")
    axes.margins(x=0.2, y=0.14)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("perplexity against size")
    return save_figure(figure, path)


def _mark_original(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    originals = {row["original_perplexity"]: row for row in rows if "original_perplexity" in row}
    if len(originals) != 1:  # runs on several models or texts have no common original
        return
    ((perplexity, row),) = originals.items()
    axes.axhline(perplexity, color="#666666", linewidth=0.8, linestyle=":")
    if "original_weights_bytes" in row:
        place = (row["original_weights_bytes"] / 1e6, perplexity)
        axes.plot(*place, marker="*", markersize=12, color="black", linestyle="none", label="original")
    else:
        axes.plot([], [], color="#666666", linestyle=":", label="original")


def _annotate(rows: Sequence[Mapping[str, Any]], size: str, axes: Axes, *, below: bool) -> None:
    """Label each run with its settings, except the method (shown by the line) and the seed (the points coincide)."""
    for row in rows:
        values = [row[key] for key in ("compressed_perplexity", "recovered_perplexity") if key in row]
        settings = {key: value for key, value in row.get("settings", {}).items() if key not in ("method", "seed")}
        if values and settings and size in row:
            axes.annotate(
                "\n".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in settings.items()),
                (row[size] / 1e6, min(values) if below else max(values)),
                xytext=(-6, -6) if below else (6, 6),
                textcoords="offset points",
                ha="right" if below else "left",
                va="top" if below else "bottom",
                fontsize=7,
                color="#333333",
            )


def draw_comparison(entries: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Draw perplexity against bytes with one line per method and one panel per stage.

    Bars are standard deviations. Horizontal lines show the original and the control (the original trained further).

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
    figure = start_figure(4.0 * len(stages) + 1.9, 4.8 if len(methods) <= 8 else 6.4)
    panels = figure.subplots(1, len(stages), squeeze=False, sharex=True, sharey=True)[0]
    original = common_level(entries, "original_perplexity")
    control = [entry for entry in entries if entry["method"] == CONTROL]
    for axes, stage in zip(panels, stages, strict=True):
        for method in methods:
            line = [entry for entry in shown if entry["method"] == method and f"{stage}_perplexity" in entry]
            _draw_line(axes, sorted(line, key=lambda entry: entry["weights_bytes"][0]), stage, looks[method], method)
        _draw_levels(axes, original, control if stage == "recovered" else [])
        axes.set_xlabel("weights (MB)")
        axes.margins(x=0.08)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.set_title(STAGES[stage][1], fontsize=10)
    panels[0].set_ylabel("validation perplexity")
    _stretch(panels[0], [*shown, *control], original or min(last_perplexity(entry) for entry in shown))
    _draw_legend(figure, panels[-1], spread=any(entry["count"] > 1 for entry in entries))
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
    axes: Axes, entries: Sequence[Mapping[str, Any]], stage: str, look: Mapping[str, Any], method: str
) -> None:
    figures = [entry[f"{stage}_perplexity"] for entry in entries]
    axes.errorbar(
        [entry["weights_bytes"][0] / 1e6 for entry in entries],
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


def _stretch(axes: Axes, entries: Sequence[Mapping[str, Any]], original: float) -> None:
    """Make the axis linear near the original's perplexity and logarithmic above, if the range is large.

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
    axes.set_yscale("function", functions=(forward, inverse))
    margin = 0.04 * float(forward(high) - forward(low))
    axes.set_ylim(float(inverse(forward(low) - margin)), float(inverse(forward(high) + margin)))
    places = np.linspace(float(forward(low)), float(forward(high)), 10)
    step = float(places[1] - places[0])
    ticks = [_round(*(float(inverse(place + part * step)) for part in (-0.3, 0.0, 0.3))) for place in places]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_ylabel("validation perplexity (stretched near the original's)")


def _round(low: float, value: float, high: float) -> float:
    """Return a value rounded to the fewest digits that stay between two bounds."""
    for digits in range(1, 6):
        candidate = float(f"{value:.{digits}g}")
        if low <= candidate <= high:
            return candidate
    return value
