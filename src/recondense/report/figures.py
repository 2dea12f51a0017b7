"""Canvas, palette and file formats of all pictures."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from recondense.files import write_aside
from recondense.full_disk import DiskFull

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito's colours, which colour-blind readers can tell apart. The markers also differ in shape.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#444444")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d", "8")
DASHES = ("-", "--", ":")
SCALE = "viridis"  # colour map for numbers
# Invisible parts of matplotlib's SVG: comments, line breaks and indentation, names, rotations by zero.
NEEDLESS_SVG = {
    r"<!--.*?-->": "",
    r"\s*\n\s*(?=[^<\s])": " ",
    r"\s*\n\s*": "\n",
    r'<g id="[a-z_2]+_\d+">': "<g>",
    r' transform="rotate\(-?0 [^"]*\)"': "",
}

log = logging.getLogger(__name__)


def start_figure(width: float, height: float) -> Figure:
    """Return an empty figure without a window; width and height are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def try_to_draw(draw: Callable[[], Path], path: Path) -> Path | None:
    """Draw a picture and return its path; None, with a warning, if it cannot be written: a picture is no result.

    Args:
        draw: draws the picture and returns its path.
        path: the picture, for the warning.
    """
    try:
        return draw()
    except (OSError, DiskFull) as error:
        log.warning("%s is not drawn: %s", path, error)
        return None


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure atomically and return its path: SVG if the file's name ends in .svg, else PNG."""
    path, data = Path(path), io.BytesIO()
    if path.suffix == ".svg":
        write_aside(path, _svg(figure))
    else:
        figure.savefig(data, format="png", dpi=DPI)
        write_aside(path, data.getvalue())
    return path


def _svg(figure: Figure) -> str:
    """Return the figure as a compact, reproducible SVG, with CSS classes for repeated styles."""
    from matplotlib import rc_context

    data = io.StringIO()
    fonts = ["DejaVu Sans", "Verdana", "sans-serif"]  # of similar width
    with rc_context({"svg.hashsalt": "recondense", "svg.fonttype": "none", "font.sans-serif": fonts}):
        figure.savefig(data, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = data.getvalue()
    for pattern, replacement in NEEDLESS_SVG.items():
        text = re.sub(pattern, replacement, text)
    text = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.4g}", text)
    classes = {style: f"s{index}" for index, style in enumerate(dict.fromkeys(re.findall(r' style="([^"]*)"', text)))}
    text = re.sub(r' style="([^"]*)"', lambda style: f' class="{classes[style[1]]}"', text)
    rules = "".join(f"\n.{name} {{{style}}}" for style, name in classes.items())
    return text.replace("</style>", f"{rules}\n</style>", 1)
