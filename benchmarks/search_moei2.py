"""MoE-I²'s genetic search of one layer, against the procedure that runs the MoE block for every individual.

    python benchmarks/search.py --method moei2 [--json FILE] [--iterations 50]

Both sides run the same seeded search and differ in how an individual's error is computed: by recondense.methods.replay,
preparation included, or by transformers' own block with the router's rows of dropped experts removed. Once without
remembering sets that were scored before, once with. Memory is the most bytes of tensors alive at once beside the model.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import subjects
import torch
from rich.table import Table
from subjects import timed
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from recondense import families
from recondense.calibrate import Tape
from recondense.methods.genetic import Genetic, best_sets
from recondense.methods.replay import Replay
from recondense.profiling import peak_tensor_bytes
from recondense.progress import progress

SCRATCH = 1 << 30


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("moei2",), default="moei2")
    parser.add_argument("--experts", type=int, default=60)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--width", type=int, default=352, help="of an expert")
    parser.add_argument("--texts", type=int, default=16, help="calibration texts of 256 random tokens")
    parser.add_argument("--dropped", type=int, default=15)
    parser.add_argument("--population", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def one_layer(args: argparse.Namespace) -> tuple[Any, Tape]:
    """A random Qwen2-MoE of one layer, and its tape."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=512, hidden_size=args.hidden_size, intermediate_size=args.width, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=8, moe_intermediate_size=args.width, num_experts=args.experts,
        shared_expert_intermediate_size=args.width, num_experts_per_tok=4, initializer_range=0.05,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval()
    model.set_experts_implementation("grouped_mm")
    ids = torch.randint(0, 512, (args.texts, 256))
    mask = torch.ones_like(ids, dtype=torch.bool)
    blocks = [(ids[first : first + 8], mask[first : first + 8]) for first in range(0, args.texts, 8)]
    return model, Tape.record(model, blocks)


def by_running_the_block(model: Any, tape: Tape) -> Callable[[Tensor], Tensor]:
    """Errors of sets, each by a forward of transformers' MoE block without its experts."""
    block = families.sparse_blocks(model)[0]
    inputs = torch.cat([trace.x_TD for trace in tape.trace(model, 0)])[None]

    @torch.no_grad()
    def errors(dropped_PE: Tensor) -> Tensor:
        whole = block.module(inputs)
        found = []
        for dropped_E in dropped_PE:
            pruned = families.masked_block(block, (~dropped_E).nonzero().flatten().tolist())
            found.append((pruned(inputs) - whole).double().norm())
        return torch.stack(found)

    return errors


def measure(model: Any, tape: Tape, args: argparse.Namespace, memoise: bool) -> dict[str, Any]:
    """Both searches: seconds, survivors, peak memory."""
    settings = Genetic(population=args.population, iterations=args.iterations, search="genetic", memoise=memoise)
    block = families.sparse_blocks(model)[0]
    scored = {"ours": 0, "block": 0}

    def ours() -> Any:
        replay = Replay(model, tape, block, args.dropped, SCRATCH)
        return search("ours", replay.errors)

    def search(side: str, errors: Callable[[Tensor], Tensor], iterations: int | None = None) -> Any:
        def counted(dropped_PE: Tensor) -> Tensor:
            scored[side] += len(dropped_PE)
            return errors(dropped_PE)

        with progress(f"{side}, {'with' if memoise else 'without'} memory", args.iterations) as bar:
            own = replace(settings, iterations=iterations or settings.iterations)
            return best_sets(
                counted, args.experts, args.dropped, own, seed=0, num_best=3, advance=lambda g, e: bar.update(g + 1)
            )

    mine, my_seconds = timed(ours)
    running = by_running_the_block(model, tape)
    theirs, their_seconds = timed(lambda: search("block", running))
    counts = dict(scored)
    return {
        "seconds": {"ours": my_seconds, "block": their_seconds},
        "times_faster": their_seconds / my_seconds,
        "scored": counts,
        "same_survivors": [each for each, _ in mine] == [each for each, _ in theirs],
        "best_error": mine[0][1],
        "peak_bytes": {
            "ours": peak_tensor_bytes(lambda: ours(), "cpu"),
            "block": peak_tensor_bytes(lambda: search("block", running, iterations=1), "cpu"),
        },
    }


def table(cases: dict[str, dict[str, Any]]) -> Table:
    """One row a case."""
    found = Table(title="one layer: genetic search for the experts to drop")
    for title in (
        "",
        "block for each individual, s",
        "recondense, s",
        "times faster",
        "scored",
        "same survivors?",
        "peak MiB",
    ):
        found.add_column(title)
    for name, case in cases.items():
        seconds, peak = case["seconds"], case["peak_bytes"]
        found.add_row(
            name,
            f"{seconds['block']:.1f}",
            f"{seconds['ours']:.2f}",
            f"{case['times_faster']:.0f}",
            f"{case['scored']['ours']:,} / {case['scored']['block']:,}",
            "yes" if case["same_survivors"] else "NO",
            f"{peak['ours'] / 2**20:.0f} (block: {peak['block'] / 2**20:.0f})",
        )
    return found


def main() -> None:
    """Measure, print, write."""
    args = arguments()
    torch.set_num_threads(args.threads)
    model, tape = one_layer(args)
    console = subjects.console()
    console.print(
        f"{args.experts} experts of {args.hidden_size} x {args.width}, top-4, {tape.num_tokens:,} tokens, "
        f"{args.dropped} to drop, population {args.population}, {args.iterations} iterations, {args.threads} threads"
    )
    cases = {}
    for name, memoise in (("no set remembered", False), ("sets remembered", True)):
        cases[name] = measure(model, tape, args, memoise)
    console.print(table(cases))
    subjects.write_json(args.json, vars(args), subjects.machine(), {"cases": cases})
    if not all(case["same_survivors"] for case in cases.values()):
        raise SystemExit("the survivors differ")


if __name__ == "__main__":
    main()
