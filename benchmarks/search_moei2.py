"""MoE-I²'s genetic search of one layer, compared with running the MoE block for every individual.

    python benchmarks/search.py --method moei2 [--json FILE] [--iterations 50]

Both sides run the same seeded search and compute the error of an individual in different ways: with
recondense.methods.search.leave_out, preparation included, or with transformers' MoE block without the router's rows of
dropped experts. They search twice: once scoring every set each time it occurs, and once scoring it only the first time.
Errors are compared to six significant digits on both sides, so that rounding does not order sets that are equally good.
The experts of the block use the faster of transformers' implementations. Memory is the peak of tensor bytes without the
model and its tape.

The block runs 5,000 times if sets are not remembered, and half as often if they are: half an hour on one free core.
With fewer iterations the preparation weighs more, and recondense gains less. Other work on the machine slows all of it
down, unevenly.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import subjects
import torch
from rich.table import Table
from subjects import timed
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from recondense.calibration.tape import Tape
from recondense.config.schema import Config
from recondense.config.types import parse_bytes
from recondense.evaluation.profiling import peak_tensor_bytes
from recondense.methods.search.genetic import Genetic, best_sets
from recondense.methods.search.leave_out import LeaveOutScorer
from recondense.models import moe_blocks
from recondense.progress import progress
from recondense.run.search_memory import scratch_bytes

Errors = Callable[[Tensor], Tensor]
IMPLEMENTATIONS = ("grouped_mm", "eager")  # of experts; batched_mm copies weights for every token


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("moei2",), default="moei2")
    parser.add_argument("--experts", type=int, default=60)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument(
        "--width", type=int, default=192, help="of an expert, routed or shared; Qwen3-MoE has 768 of 2048"
    )
    parser.add_argument("--texts", type=int, default=16, help="calibration texts of 256 random tokens")
    parser.add_argument("--dropped", type=int, default=15)
    parser.add_argument("--population", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--implementation", choices=("auto", *IMPLEMENTATIONS), default="auto", help="of the block")
    parser.add_argument("--max-scratch-bytes", default="auto", help="our bound on temporary tensors, as in train.py")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    if args.max_scratch_bytes != "auto":
        args.max_scratch_bytes = parse_bytes(args.max_scratch_bytes)
    return args


def make_layer(args: argparse.Namespace) -> tuple[Any, Tape]:
    """A random Qwen2-MoE of one layer, and its tape."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=512, hidden_size=args.hidden_size, intermediate_size=args.width, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=8, moe_intermediate_size=args.width, num_experts=args.experts,
        shared_expert_intermediate_size=args.width, num_experts_per_tok=args.top_k, initializer_range=0.05,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval()
    model.set_experts_implementation("grouped_mm")
    ids = torch.randint(0, 512, (args.texts, 256))
    mask = torch.ones_like(ids, dtype=torch.bool)
    blocks = [(ids[first : first + 8], mask[first : first + 8]) for first in range(0, args.texts, 8)]
    return model, Tape.record(model, blocks)


def block_errors(model: Any, tape: Tape) -> Errors:
    """A function that computes the error of every set by running transformers' MoE block without its experts."""
    block = moe_blocks.sparse_blocks(model)[0]
    inputs_1TD = torch.cat([trace.x_TD for trace in tape.trace(model, 0)])[None]
    outputs_1TD = torch.cat([trace.output_TD for trace in tape.trace(model, 0)])[None]

    @torch.no_grad()
    def errors(dropped_PE: Tensor) -> Tensor:
        norms = []
        for dropped_E in dropped_PE:
            pruned = moe_blocks.masked_block(block, (~dropped_E).nonzero().flatten().tolist())
            norms.append((pruned(inputs_1TD) - outputs_1TD).double().norm())
        return torch.stack(norms)

    return errors


def choose_implementation(model: Any, errors: Errors, args: argparse.Namespace) -> dict[str, float]:
    """Set the fastest implementation of the block's experts; return the seconds of a forward with each."""
    names = IMPLEMENTATIONS if args.implementation == "auto" else (args.implementation,)
    dropped_PE = torch.zeros(3, args.experts, dtype=torch.bool)
    dropped_PE[:, : args.dropped] = True
    seconds = {}
    for name in names:
        model.set_experts_implementation(name)
        errors(dropped_PE)
        seconds[name] = min(timed(lambda: errors(dropped_PE[:1]))[1] for _ in range(5))
    model.set_experts_implementation(min(seconds, key=lambda name: seconds[name]))
    return seconds


@dataclass
class Run:
    """One search: the sets that it scored, in order, the best sets at the end, and seconds."""

    scored: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    best: list[tuple[tuple[int, ...], float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def count(self) -> int:
        return sum(len(dropped_PE) for dropped_PE, _ in self.scored)


def run(prepare: Callable[[], Errors], settings: Genetic, args: argparse.Namespace, title: str) -> Run:
    """Search with the errors of one side; the time includes its preparation."""
    result = Run()

    def search() -> None:
        errors = prepare()

        def noting_errors(dropped_PE: Tensor) -> Tensor:
            values = errors(dropped_PE)
            result.scored.append((dropped_PE, values))
            return values

        with progress(title, settings.iterations) as bar:

            def show(generation: int, best: float) -> None:
                bar.update(generation + 1)
                bar.note(f"best error {best:.6g}")

            result.best = best_sets(
                noting_errors, args.experts, args.dropped, settings, args.seed, settings.parents, show
            )

    _, result.seconds = timed(search)
    return result


def measure(model: Any, tape: Tape, args: argparse.Namespace, memoise: bool) -> dict[str, Any]:
    """Seconds, survivors and peak memory of both searches; ours runs before and after the block's."""
    settings = Genetic(args.population, args.iterations, search="genetic", memoise=memoise)
    settings = replace(settings, parents=max(2, min(settings.parents, args.population // 2)))
    block = moe_blocks.sparse_blocks(model)[0]
    scratch = scratch_bytes(Config(max_scratch_bytes=args.max_scratch_bytes), model.device)
    errors_by_block = block_errors(model, tape)

    def prepare() -> Errors:
        return LeaveOutScorer.prepare(model, tape, block, args.dropped, scratch).errors

    title = f"{'with' if memoise else 'without'} memory"
    ours = [run(prepare, settings, args, f"recondense, {title}") for _ in range(2)]
    block_run = run(lambda: errors_by_block, settings, args, f"block, {title}")
    ours.append(run(prepare, settings, args, f"recondense, {title}"))
    seconds = statistics.median(search.seconds for search in ours)
    once = replace(settings, iterations=1)  # every later generation takes as much
    return {
        "seconds": {"ours": subjects.spread([search.seconds for search in ours]), "block": block_run.seconds},
        "preparation_seconds": subjects.spread([timed(prepare)[1] for _ in range(3)]),
        "times_faster": block_run.seconds / seconds,
        "scored": {"ours": ours[-1].count, "block": block_run.count},
        "best_error": block_run.best[0][1],
        "peak_bytes": {
            "ours": peak_tensor_bytes(lambda: run(prepare, once, args, "memory"), "cpu"),
            "block": peak_tensor_bytes(lambda: errors_by_block(block_run.scored[0][0][:2]), "cpu"),
        },
        **agreement(ours, block_run),
    }


def agreement(ours: list[Run], block_run: Run) -> dict[str, Any]:
    """Whether both sides had the same populations and the same survivors in every run."""
    pairs = list(zip(ours[-1].scored, block_run.scored, strict=False))
    same = [sets.shape == block_sets.shape and torch.equal(sets, block_sets) for (sets, _), (block_sets, _) in pairs]
    alike = [pair for pair, equal in zip(pairs, same, strict=True) if equal]
    survivors = [dropped for dropped, _ in block_run.best]
    return {
        "same_survivors": all([dropped for dropped, _ in search.best] == survivors for search in ours),
        "survivors": len(survivors),
        "same_generations": sum(same),
        "generations": len(block_run.scored),
        "largest_relative_difference": max(
            float(((errors - expected).abs() / expected).max()) for (_, errors), (_, expected) in alike
        ),
    }


def table(cases: dict[str, dict[str, Any]]) -> Table:
    """A column for each case."""
    result = Table("", *cases, title="one layer: genetic search for the experts to drop")
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "block for each individual, s": lambda case: f"{case['seconds']['block']:.1f}",
        "recondense, s": lambda case: time_cell(case["seconds"]["ours"]),
        "  of which preparation": lambda case: time_cell(case["preparation_seconds"]),
        "times faster": lambda case: f"{case['times_faster']:.0f}",
        "sets scored, each side": lambda case: " / ".join(f"{count:,}" for count in case["scored"].values()),
        "same survivors?": describe,
        "peak of tensors, MiB, block": lambda case: f"{case['peak_bytes']['block'] / 2**20:.0f}",
        "peak of tensors, MiB, recondense": lambda case: f"{case['peak_bytes']['ours'] / 2**20:.0f}",
    }
    for title, cell in rows.items():
        result.add_row(title, *(cell(case) for case in cases.values()))
    return result


def time_cell(times: dict[str, Any]) -> str:
    return f"{times['median']:.2f} ({times['min']:.2f} to {times['max']:.2f})"


def describe(case: dict[str, Any]) -> str:
    """Whether both sides have the same survivors, in words."""
    return (
        f"{'yes' if case['same_survivors'] else 'NO'}: the best {case['survivors']}; {case['same_generations']} of "
        f"{case['generations']} generations equal, errors within {case['largest_relative_difference']:.0e} relative"
    )


def main() -> None:
    """Measure, print, write."""
    args = arguments()
    torch.set_num_threads(args.threads)
    model, tape = make_layer(args)
    forward = choose_implementation(model, block_errors(model, tape), args)
    console = subjects.console()
    console.print(
        f"{args.experts} experts of {args.hidden_size} x {args.width}, top-{args.top_k}, {tape.num_tokens:,} tokens, "
        f"{args.dropped} to drop, population {args.population}, {args.iterations} iterations, {args.threads} threads. "
        f"The block runs once in {', '.join(f'{value:.3f} s ({name})' for name, value in forward.items())}."
    )
    cases = {}
    for name, memoise in (("no set remembered", False), ("sets remembered", True)):
        cases[name] = measure(model, tape, args, memoise)
    console.print(table(cases))
    subjects.write_json(args.json, vars(args), subjects.machine(), {"block_seconds": forward, "cases": cases})
    if not all(case["same_survivors"] for case in cases.values()):
        raise SystemExit("the survivors differ")


if __name__ == "__main__":
    main()
