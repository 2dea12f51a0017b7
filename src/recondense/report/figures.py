"""The canvas, the palette and the files of all pictures."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from recondense.files import write_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito's colours, which are told apart without colour vision. Marks differ in shape as well.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#444444")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d", "8")
DASHES = ("-", "--", ":")
SCALE = "viridis"  # of numbers
# What matplotlib writes into an SVG and nobody sees: comments, line breaks and indents, names, rotations by nothing.
NEEDLESS_SVG = {
    r"<!--.*?-->": "",
    r"\s*\n\s*(?=[^<\s])": " ",
    r"\s*\n\s*": "\n",
    r'<g id="[a-z_2]+_\d+">': "<g>",
    r' transform="rotate\(-?0 [^"]*\)"': "",
}


def start_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that no window belongs to."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure aside, then rename it: as SVG if the file's name ends in .svg, else as PNG."""
    path, data = Path(path), io.BytesIO()
    if path.suffix == ".svg":
        write_aside(path, _svg(figure))
    else:
        figure.savefig(data, format="png", dpi=DPI)
        write_aside(path, data.getvalue())
    return path


def _svg(figure: Figure) -> str:
    """The figure as a small SVG: the same text whenever it is drawn, and a class in place of each repeated style."""
    from matplotlib import rc_context

    data = io.StringIO()
    fonts = ["DejaVu Sans", "Verdana", "sans-serif"]  # alike in width
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
