"""Low-rank experts compared with transformers' fused dense experts: forward, and forward with backward.

    python benchmarks/low_rank.py [--device cuda] [--shapes 60x2048x1408] [--json FILE]

Both sides get the same tokens and the same random routing. Weights are random, have one dtype, and all train in the
backward. The dense experts use the faster of transformers' implementations in every cell. The two sides are timed in
turns, and a cell is the ratio of medians, dense / low-rank: above 1 the low-rank experts are faster. The retained share
of the arithmetic is rank·(D + F) / (D·F). "uneven" ranks are those of MoE-I²'s formula for importances that differ by
up to a factor of 3, in multiples of 1 and of the default.

The exit code is 1 if experts with D·F >= 512·352 are less than 0.9 times as fast as dense ones at half the arithmetic
or less. Smaller experts, whose time goes into calls, are shown without a limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import subjects
import torch
from rich.table import Table
from subjects import timed
from torch import Tensor, nn
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from recondense.methods.search import ranks
from recondense.models.low_rank import LowRankExperts
from recondense.models.replacement_blocks import GLU

IMPLEMENTATIONS = ("grouped_mm", "eager")  # batched_mm copies weights for every token
RETAINED = (0.25, 0.5, 0.614, 0.9)  # of the arithmetic
AT_HALF = 0.505  # of the arithmetic, or less: ranks are integers
JUDGED = 512 * 352  # hidden size x width: smaller experts cost calls, not arithmetic
NOISE = 0.9  # times as fast: a slower result is more than noise
NAMES = ("gate_proj", "up_proj", "down_proj")
IMPORTANCE_RANGE = 3.0  # the largest uneven importance divided by the smallest


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="experts x hidden size x width")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each side of a cell")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    args.shapes = args.shapes or (["16x128x64", "16x512x352"] if on_cpu else ["60x2048x1408"])
    args.tokens = args.tokens or ([1, 64, 512, 2048] if on_cpu else [256, 2048, 16384])
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    return args


def dense_experts(shape: tuple[int, int, int], args: argparse.Namespace) -> Any:
    """transformers' fused experts with random weights."""
    config = Qwen2MoeConfig(
        hidden_size=shape[1], moe_intermediate_size=shape[2], num_experts=shape[0], num_experts_per_tok=args.top_k
    )
    config._experts_implementation = "grouped_mm"
    return fill_randomly(Qwen2MoeExperts(config), args)


def fill_randomly(module: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Give a module random weights of the benchmark's dtype on its device, all of which train."""
    module = module.to(args.device, getattr(torch, args.dtype))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module.requires_grad_(True)


def cases(shape: tuple[int, int, int]) -> dict[str, ranks.Ranks]:
    """Ranks of all experts, by the share of the arithmetic that they retain."""
    num_experts, hidden_size, width = shape
    multiple = ranks.resolve_multiple("auto", hidden_size, width, 0.5 * ranks.break_even(hidden_size, width))
    average = {share: max(1, round(share * ranks.break_even(hidden_size, width))) for share in RETAINED}
    ranks_by_name: dict[str, ranks.Ranks] = {f"{share:g}": [rank] * num_experts for share, rank in average.items()}
    importance = [IMPORTANCE_RANGE ** (j / (num_experts - 1)) for j in range(num_experts)]
    for step in sorted({1, multiple}):
        uneven = ranks.allocate(importance, average[0.5], hidden_size, width, multiple=step)
        ranks_by_name[f"0.5 uneven, multiples of {step}"] = uneven
    return ranks_by_name


class Side:
    """One of the two modules to time: its forward, and its forward with backward."""

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.module, self.inputs = module, inputs

    def forward(self) -> None:
        with torch.no_grad():
            self.module(*self.inputs)

    def backward(self) -> None:
        x_TD, *routing = self.inputs
        x_TD = x_TD.detach().requires_grad_(True)
        self.module.zero_grad(set_to_none=True)
        y_TD = self.module(x_TD, *routing)
        y_TD.backward(torch.ones_like(y_TD))


def alternate(works: Sequence[Callable[[], None]], seconds: float, device: str) -> list[float]:
    """Median seconds of every work; they run in turns after a warm-up."""
    for work in works:
        work()
    once = sum(timed(work, device)[1] for work in works)
    rounds = max(5, min(200, round(seconds * len(works) / max(once, 1e-9))))
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work_times, work in zip(times, works, strict=True):
            work_times.append(timed(work, device)[1])
    return [statistics.median(work_times) for work_times in times]


def measure(shape: tuple[int, int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """All cells of one shape."""
    generator = torch.Generator().manual_seed(0)
    dense, cells = dense_experts(shape, args), []
    dense_parameters = sum(parameter.numel() for parameter in dense.parameters())
    for name, expert_ranks in cases(shape).items():
        low = fill_randomly(
            LowRankExperts(*shape[1:], dict.fromkeys(NAMES, tuple(expert_ranks)), GLU(dense.act_fn)), args
        )
        cell: dict[str, Any] = {"shape": "x".join(map(str, shape)), "ranks": name, "different": len(set(expert_ranks))}
        cell["arithmetic"] = sum(parameter.numel() for parameter in low.parameters()) / dense_parameters
        for num_tokens in args.tokens:
            draws_TE = torch.rand(num_tokens, shape[0], generator=generator)
            weights_TK, index_TK = draws_TE.topk(args.top_k, dim=1)
            x_TD = torch.randn(num_tokens, shape[1], generator=generator)
            dtype = getattr(torch, args.dtype)
            inputs = x_TD.to(args.device, dtype), index_TK.to(args.device), weights_TK.to(args.device, dtype)
            for way in ("forward", "backward"):
                times = {}
                for implementation in IMPLEMENTATIONS:
                    dense.config._experts_implementation = implementation
                    pair = [getattr(Side(module, inputs), way) for module in (dense, low)]
                    times[implementation] = alternate(pair, args.seconds / 2, args.device)
                best = min(times, key=lambda implementation: times[implementation][0])
                cell[f"{way} {num_tokens}"] = {
                    "implementation": best, "dense": times[best][0], "low_rank": times[best][1],
                    "times_faster": times[best][0] / times[best][1],
                }  # fmt: skip
        cells.append(cell)
    return cells


def table(cells: Sequence[dict[str, Any]], args: argparse.Namespace) -> Table:
    """A line for every case, a column for every number of tokens; slower timings at half the arithmetic are marked."""
    result = Table(title=f"dense / low-rank seconds: {cells[0]['shape'].replace('x', ' x ')}", title_justify="left")
    for title in ("arithmetic", *(f"{way}\n{num}" for way in ("forward", "backward") for num in args.tokens)):
        result.add_column(title, justify="left" if title == "arithmetic" else "right")
    for cell in cells:
        row = [f"{cell['arithmetic']:.3f}{cell['ranks'].lstrip('0123456789.')}"]
        for way in ("forward", "backward"):
            for num in args.tokens:
                ratio = cell[f"{way} {num}"]["times_faster"]
                mark = " !" if ratio < 1 and cell["arithmetic"] <= AT_HALF else ""
                row.append(f"{ratio:.2f}{mark}")
        result.add_row(*row)
    return result


def judge(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many timings of large enough experts are slower than dense ones at half the arithmetic or less.

    Returns:
        slower, of: how many of how many; slowest: the smallest ratio (None without timings); failed: it is below noise.
    """
    ratios = []
    for cell in cells:
        _, hidden_size, width = map(int, cell["shape"].split("x"))
        if hidden_size * width >= JUDGED and cell["arithmetic"] <= AT_HALF:
            ratios += [timing["times_faster"] for timing in cell.values() if isinstance(timing, dict)]
    slowest = min(ratios, default=None)
    failed = slowest is not None and slowest < NOISE
    return {"slower": sum(ratio < 1 for ratio in ratios), "of": len(ratios), "slowest": slowest, "failed": failed}


def verdict(judged: dict[str, Any]) -> str:
    """The last sentence of the output."""
    if not judged["of"]:
        return "No experts of 512 x 352 or more were timed at half the arithmetic or less: nothing to judge."
    words = f"{judged['slower']} of {judged['of']} timings at half the arithmetic or less are slower than dense experts"
    end = f": too slow, below {NOISE}." if judged["failed"] else "."
    return f"{words} (experts of 512 x 352 or more); the slowest is {judged['slowest']:.2f} times as fast{end}"


def main() -> int:
    """Measure, print, write; 1 if low-rank experts are too slow."""
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    console = subjects.console()
    console.print(
        f"top-{args.top_k}, {args.dtype}, {args.device}, {args.threads} threads; columns: tokens. Above 1 the low-rank "
        "experts are faster than the dense ones; ! marks where they are not at half the arithmetic or less. "
        "backward: forward and backward, all weights training."
    )
    cells = []
    for shape in args.shapes:
        experts, hidden_size, width = map(int, shape.split("x"))
        shape_cells = measure((experts, hidden_size, width), args)
        cells += shape_cells
        console.print(table(shape_cells, args))
    judged = judge(cells)
    console.print(verdict(judged))
    figures = {"cells": cells, "slower_at_half": judged}
    subjects.write_json(args.json, vars(args), subjects.machine(args.device), figures)
    return int(judged["failed"])


if __name__ == "__main__":
    raise SystemExit(main())
