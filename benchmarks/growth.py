"""How the cost of a search grows with tokens, layers and experts: slopes of seconds on log-log axes.

    python benchmarks/growth.py [--repeats 3] [--hidden-size 64] [--json FILE]

Every point is a random Qwen2-MoE that differs from the base in one size. Searches are timed with a tape in memory,
without the time to record it. Every repetition visits all points, and the fastest counts. CD-MoE's greedy layer search
reruns all layers above every candidate, so it grows with the square of the layers: it is shown without a limit.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import subjects
import torch
from rich.table import Table
from subjects import timed
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from recondense.calibration.tape import Tape
from recondense.methods.cdmoe import CDMoE
from recondense.methods.moei2 import InterExpertPruning
from recondense.methods.search.genetic import Genetic
from recondense.methods.step import SearchContext
from recondense.progress import track

BASE = {"tokens": 1024, "layers": 6, "experts": 32, "retained": 4}
SCRATCH = 1 << 28
LIMITS = {"tokens": 1.1, "layers": 1.1, "experts x retained": 1.0}
POINTS: dict[str, list[dict[str, int]]] = {
    "tokens": [{"tokens": value} for value in (512, 1024, 2048, 4096)],
    "layers": [{"layers": value} for value in (3, 6, 12, 24)],
    "experts x retained": [
        {"experts": experts, "retained": retained}
        for experts, retained in ((16, 2), (16, 4), (32, 4), (32, 8), (64, 8))
    ],
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=64, help="of a routed expert")
    parser.add_argument("--scale", type=float, default=1.0, help="of the tokens of all points")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def make_model(sizes: dict[str, int], args: argparse.Namespace) -> tuple[PreTrainedModel, Tape]:
    """A random model of these sizes, and its tape."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=512, hidden_size=args.hidden_size, num_hidden_layers=sizes["layers"], num_attention_heads=4,
        num_key_value_heads=4, num_experts=sizes["experts"], num_experts_per_tok=4, moe_intermediate_size=args.width,
        intermediate_size=4 * args.width, shared_expert_intermediate_size=4 * args.width, max_position_embeddings=512,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval()
    model.set_experts_implementation("grouped_mm")
    num_texts = max(1, int(sizes["tokens"] * args.scale) // 128)
    texts = subjects.random_texts(512, num_texts, 128)
    return model, Tape.record(model, list(texts.batches(8)))


def cdmoe(model: PreTrainedModel, tape: Tape, sizes: dict[str, int]) -> None:
    """The search for the experts of every layer."""
    CDMoE(sizes["retained"], "all").search(SearchContext(model, lambda: tape, {}, SCRATCH))


def cdmoe_layers(model: PreTrainedModel, tape: Tape, sizes: dict[str, int]) -> float:
    """Seconds of the search for the two layers to condense."""
    _, record = CDMoE(sizes["retained"], 2).search(SearchContext(model, lambda: tape, {}, SCRATCH))
    return float(record["seconds"]["layer_search"])


def moei2(model: PreTrainedModel, tape: Tape, sizes: dict[str, int]) -> None:
    """Importances, a genetic search with twenty sets and ten generations, and reception fields."""
    step = InterExpertPruning(genetic=Genetic(population=20, iterations=10, parents=5, search="genetic"))
    step.search(SearchContext(model, lambda: tape, {}, SCRATCH))


Search = Callable[[PreTrainedModel, Tape, dict[str, int]], float | None]
SEARCHES: dict[str, tuple[Search, list[str]]] = {
    "cdmoe, experts": (cdmoe, list(POINTS)),
    "moei2": (moei2, ["tokens", "layers"]),
    "cdmoe, two layers": (cdmoe_layers, ["tokens", "layers"]),
}
LIMITED = ("cdmoe, experts", "moei2")


def slope(sizes: list[float], seconds: list[float]) -> float:
    """The slope of the least-squares line through the logarithms."""
    xs, ys = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The seconds of every search at every point, and the slopes."""
    points = [(axis, point) for axis, axis_points in POINTS.items() for point in axis_points]
    best: dict[tuple[str, str, int], float] = {}
    for _ in range(args.repeats):
        for number, (axis, point) in enumerate(track(points, "searching")):
            sizes = BASE | point
            model, tape = make_model(sizes, args)
            for name, (search, axes) in SEARCHES.items():
                if axis in axes:
                    reported, seconds = timed(lambda run=search, m=model, t=tape, s=sizes: run(m, t, s))
                    key = name, axis, number
                    best[key] = min(best.get(key, math.inf), reported or seconds)
    rows = []
    for name, (_, axes) in SEARCHES.items():
        for axis in axes:
            numbers = [number for number, (point_axis, _) in enumerate(points) if point_axis == axis]
            products = [float(math.prod(points[number][1].values())) for number in numbers]
            seconds = [best[name, axis, number] for number in numbers]
            limit = LIMITS[axis] if name in LIMITED else None
            rows.append({"search": name, "axis": axis, "sizes": products, "seconds": seconds,
                         "slope": slope(products, seconds), "limit": limit})  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """A row for each search and axis."""
    result = Table(title="Growth of the seconds of a search")
    for column in ("search", "with", "sizes", "seconds", "slope", "at most"):
        result.add_column(column, justify="left" if column in ("search", "with") else "right")
    for row in rows:
        result.add_row(
            row["search"],
            row["axis"],
            " ".join(f"{size:g}" for size in row["sizes"]),
            " ".join(f"{second:.2f}" for second in row["seconds"]),
            f"{row['slope']:.2f}",
            "" if row["limit"] is None else f"{row['limit']:g}",
        )
    return result


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    rows = measure(args)
    subjects.console().print(table(rows))
    subjects.write_json(args.json, vars(args), subjects.machine(), {"rows": rows})
    steep = [row for row in rows if row["limit"] is not None and row["slope"] > row["limit"]]
    if steep:
        raise SystemExit("too steep: " + ", ".join(f"{row['search']} with {row['axis']}" for row in steep))


if __name__ == "__main__":
    main()
