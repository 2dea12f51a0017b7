"""Low-rank experts against transformers' fused dense experts: forward, and forward with backward.

    python benchmarks/low_rank.py [--device cuda] [--shapes 60x2048x1408] [--json FILE]

Both get the same tokens and the same routing, drawn evenly; weights are random, of one dtype, and train in the
backward. The dense experts run in whichever of transformers' implementations is faster in that cell. Timings alternate
between the two; a cell is the ratio of medians, dense / low-rank: above 1 the low-rank experts are faster. What is kept
of the arithmetic is rank·(D + F) / (D·F). "uneven" ranks are those that MoE-I2's formula gives to importances that
spread 3-fold, in multiples of 1 and of the default.

Ends with exit code 1 if experts of D·F >= 512·352 are less than 0.9 times as fast as dense ones at half the arithmetic
or less. Smaller ones, whose time goes into calls, are shown only.
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

IMPLEMENTATIONS = ("grouped_mm", "eager")  # batched_mm gathers weights for every token
KEPT = (0.25, 0.5, 0.614, 0.9)  # of the arithmetic
AT_HALF = 0.505  # of the arithmetic or less: ranks are whole
JUDGED = 512 * 352  # hidden size x width: smaller experts cost calls, not arithmetic
NOISE = 0.9  # times as fast: what is slower than that is no matter of noise
NAMES = ("gate_proj", "up_proj", "down_proj")
SPREAD = 3.0  # of the uneven importances


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="experts x hidden size x width")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on each side of a cell")
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
    return filled(Qwen2MoeExperts(config), args)


def filled(module: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Random weights of the benchmark's dtype on its device, all of which train."""
    module = module.to(args.device, getattr(torch, args.dtype))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module.requires_grad_(True)


def cases(shape: tuple[int, int, int]) -> dict[str, ranks.Ranks]:
    """Ranks of each expert, by a name that says what they keep."""
    num_experts, hidden_size, width = shape
    multiple = ranks.resolve_multiple("auto", hidden_size, width, 0.5 * ranks.break_even(hidden_size, width))
    average = {kept: max(1, round(kept * ranks.break_even(hidden_size, width))) for kept in KEPT}
    found: dict[str, ranks.Ranks] = {f"{kept:g}": [rank] * num_experts for kept, rank in average.items()}
    importance = [SPREAD ** (j / (num_experts - 1)) for j in range(num_experts)]
    for step in sorted({1, multiple}):
        own = ranks.allocate(importance, average[0.5], hidden_size, width, multiple=step)
        found[f"0.5 uneven, multiples of {step}"] = own
    return found


class Side:
    """One of two modules to time: its forward, and with it its backward."""

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
    """Median seconds of each work, run in turn after one round that does not count."""
    for work in works:
        work()
    once = sum(timed(work, device)[1] for work in works)
    rounds = max(5, min(200, round(seconds * len(works) / max(once, 1e-9))))
    found: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for own, work in zip(found, works, strict=True):
            own.append(timed(work, device)[1])
    return [statistics.median(own) for own in found]


def measure(shape: tuple[int, int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every cell of one shape."""
    generator = torch.Generator().manual_seed(0)
    dense, found = dense_experts(shape, args), []
    dense_parameters = sum(parameter.numel() for parameter in dense.parameters())
    for name, own in cases(shape).items():
        low = filled(LowRankExperts(*shape[1:], dict.fromkeys(NAMES, tuple(own)), GLU(dense.act_fn)), args)
        cell: dict[str, Any] = {"shape": "x".join(map(str, shape)), "ranks": name, "different": len(set(own))}
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
                best = min(times, key=lambda each: times[each][0])
                cell[f"{way} {num_tokens}"] = {
                    "implementation": best, "dense": times[best][0], "low_rank": times[best][1],
                    "times_faster": times[best][0] / times[best][1],
                }  # fmt: skip
        found.append(cell)
    return found


def table(cells: Sequence[dict[str, Any]], args: argparse.Namespace) -> Table:
    """A line a rank, a column a number of tokens; below half the arithmetic what is slower is marked."""
    found = Table(title=f"dense / low-rank seconds: {cells[0]['shape'].replace('x', ' x ')}", title_justify="left")
    for title in ("arithmetic kept", *(f"{way}\n{num}" for way in ("forward", "backward") for num in args.tokens)):
        found.add_column(title, justify="left" if title == "arithmetic kept" else "right")
    for cell in cells:
        row = [f"{cell['arithmetic']:.3f}{cell['ranks'].lstrip('0123456789.')}"]
        for way in ("forward", "backward"):
            for num in args.tokens:
                ratio = cell[f"{way} {num}"]["times_faster"]
                mark = " !" if ratio < 1 and cell["arithmetic"] <= AT_HALF else ""
                row.append(f"{ratio:.2f}{mark}")
        found.add_row(*row)
    return found


def judge(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many timings of large enough experts are slower than dense ones at half the arithmetic or less.

    Returns:
        slower, of; the slowest (None without any); failed: it is slower by more than noise.
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
    """The closing sentence."""
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
    found = []
    for shape in args.shapes:
        experts, hidden_size, width = map(int, shape.split("x"))
        found += (cells := measure((experts, hidden_size, width), args))
        console.print(table(cells, args))
    judged = judge(found)
    console.print(verdict(judged))
    figures = {"cells": found, "slower_at_half": judged}
    subjects.write_json(args.json, vars(args), subjects.machine(args.device), figures)
    return int(judged["failed"])


if __name__ == "__main__":
    raise SystemExit(main())
