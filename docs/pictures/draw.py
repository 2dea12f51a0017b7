"""Draw the pictures of README and docs from the figures beside this file: make pictures

    plan.svg          from plan.json, which `make demo` wrote
    comparison.svg    from comparison.json: means and standard deviations of `python train.py experiment=compare`

The same figures give the same files, byte for byte, with the same version of matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recondense.report.plan_picture import draw_searches
from recondense.report.sweep_picture import draw_comparison

HERE = Path(__file__).resolve().parent


def draw(folder: Path) -> list[Path]:
    """Write every picture.

    Args:
        folder: where to write.

    Returns:
        the files.
    """
    plan, entries = (json.loads((HERE / name).read_text(encoding="utf-8")) for name in ("plan.json", "comparison.json"))
    comparison = draw_comparison(entries, folder / "comparison.svg")
    assert comparison is not None
    return [draw_searches(plan, folder / "plan.svg"), comparison]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="where to write (default: beside this file)")
    for path in draw(parser.parse_args().folder):
        print(path)
