"""Qwen1.5-MoE-A2.7B at its real size with random weights: the time of a method's stages, and what it saves.

    python benchmarks/real_size.py --device cuda --condense 9 [--experts 4] [--json FILE]
    python benchmarks/real_size.py --device cuda --method moei2 [--prune-ratio 0.25] [--average-rank 512]
    python benchmarks/real_size.py --device cpu --scale tiny          (a smoke test that takes seconds)

Quality cannot be measured with random weights. Times, bytes and speeds do not depend on the weights, except through the
routing: random weights distribute tokens evenly. The authors' expert search is not run: one of its passes through the
whole model is timed and multiplied by their number.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import subjects
import torch
from rich.table import Table
from subjects import timed
from transformers import AutoTokenizer, PreTrainedModel

from recondense.calibration.tape import TEXTS_PER_BATCH, Tape
from recondense.config.schema import Config
from recondense.config.types import parse_bytes
from recondense.data.calibration_set import CalibrationSet, make_calibration_set
from recondense.data.text_files import read_texts
from recondense.evaluation.profiling import Variant, peak_tensor_bytes, profile_variants
from recondense.methods.cdmoe import CDMoE
from recondense.methods.decompose import Decompose
from recondense.methods.moei2 import InterExpertPruning
from recondense.methods.step import SearchContext
from recondense.models import moe_blocks
from recondense.operations import Condense
from recondense.plan import Plan
from recondense.run.search_memory import scratch_bytes
from recondense.surgery import execute

sys.path.insert(0, str(subjects.ROOT / "tests"))
from support import brute_force as bf

GIBIBYTE = 2**30
# 9 layers with E(4+4): the memory ratio from shapes, and the authors' measurements.
ARITHMETIC_RATIO, PUBLISHED_RATIO, PUBLISHED_SPEEDUP = 0.6954, 0.697, 1.30

STAGES = {
    "importance": "expert importance",
    "genetic": "genetic search",
    "reception_field": "KT-reception field",
    "ranks": "ranks, importance of the retained experts",
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("cdmoe", "moei2"), default="cdmoe")
    parser.add_argument("--scale", choices=("real", "tiny"), default="real")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--implementation", choices=("grouped_mm", "eager", "batched_mm"), default="grouped_mm")
    parser.add_argument("--condense", type=int, default=9, help="layers to condense")
    parser.add_argument("--experts", type=int, default=4, help="routed experts that they retain")
    parser.add_argument(
        "--prune-ratio", type=float, default=0.25, help="moei2: fraction of the routed experts to prune"
    )
    parser.add_argument(
        "--average-rank", default="auto", help="moei2: average rank of the factors; auto is 512 at real size"
    )
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument(
        "--texts-file", type=Path, help="jsonl or plain text, with --tokenizer (default: random tokens)"
    )
    parser.add_argument("--tokenizer", help="folder or hub id")
    parser.add_argument("--repeats", type=int, default=3, help="timed searches, after a warm-up")
    parser.add_argument("--max-scratch-bytes", default="auto", help="bound on temporary tensors, as in train.py")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16], help="of prefill and decode")
    parser.add_argument("--prompt-length", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5, help="of prefill and decode, in turns")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    if (args.texts_file is None) != (args.tokenizer is None):
        parser.error("--texts-file and --tokenizer go together")
    if args.average_rank != "auto":
        args.average_rank = int(args.average_rank)
    if args.max_scratch_bytes != "auto":
        args.max_scratch_bytes = parse_bytes(args.max_scratch_bytes)
    return args


def texts(args: argparse.Namespace, vocab_size: int) -> CalibrationSet:
    """The calibration set: from a file, or random tokens."""
    if args.texts_file is None:
        return subjects.random_texts(vocab_size, args.texts, args.tokens)
    documents = [text for _, text in read_texts(args.texts_file)]
    return make_calibration_set(documents, AutoTokenizer.from_pretrained(args.tokenizer), args.texts, args.tokens)


def search(
    model: PreTrainedModel, calibration: CalibrationSet, args: argparse.Namespace
) -> tuple[Plan, dict[str, Any]]:
    """Time taping, expert search and layer search; return the plan of the last repetition and the figures."""
    step = CDMoE(args.experts, args.condense)
    scratch = scratch_bytes(Config(max_scratch_bytes=args.max_scratch_bytes), model.device)
    seconds: dict[str, list[float]] = {"taping": [], "expert_search": [], "layer_search": []}

    def tape(num_texts: int | None = None) -> Tape:
        return Tape.record(model, CalibrationSet(calibration.ids[:num_texts]).batches(TEXTS_PER_BATCH))

    def search_once(tape: Tape) -> tuple[list[Condense], dict[str, Any]]:
        return step.search(SearchContext(model, lambda: tape, {}, scratch))

    search_once(tape(TEXTS_PER_BATCH))  # a warm-up
    for _ in range(args.repeats):
        taped, taping = timed(tape, model.device)
        operations, record = search_once(taped)
        for name, value in {"taping": taping, **record["seconds"]}.items():
            seconds[name].append(value)
    figures: dict[str, Any] = {name: subjects.spread(values) for name, values in seconds.items()}
    figures["layer_runs"] = record["layer_search"]["layer_runs"]
    figures["tape_bytes"] = taped.nbytes
    del taped
    figures["peak_tensor_bytes"] = peak_tensor_bytes(lambda: search_once(tape()), model.device)
    figures["max_scratch_bytes"] = scratch
    return Plan("qwen", tuple(operations), search=record), figures


def stages(
    model: PreTrainedModel, calibration: CalibrationSet, args: argparse.Namespace
) -> tuple[Plan, dict[str, Any]]:
    """Time every stage of MoE-I²'s search, run as by `train.py`; the model is unchanged afterwards."""
    scratch = scratch_bytes(Config(max_scratch_bytes=args.max_scratch_bytes), model.device)
    seconds: dict[str, float] = {}
    operations: list[Any] = []
    tapes: list[Tape] = []

    def step(method: Any, before: str) -> list[Any]:
        blocks = calibration.batches(TEXTS_PER_BATCH)
        tape, seconds[f"taping before {before}"] = timed(lambda: Tape.record(model, blocks), model.device)
        tapes[:] = [tape]
        (step_operations, record), _ = timed(
            lambda: method.search(SearchContext(model, lambda: tape, {}, scratch)), model.device
        )
        seconds.update({STAGES.get(name, name): value for name, value in record["seconds"].items()})
        operations.extend(step_operations)
        return step_operations

    def both() -> None:
        pruned = Plan("qwen", tuple(step(InterExpertPruning(prune_ratio=args.prune_ratio), "pruning")))
        originals, seconds["pruning"] = timed(lambda: execute.execute(model, pruned), model.device)
        step(Decompose(average_rank=args.average_rank), "factorizing")
        for layer, block in originals.items():
            moe_blocks.set_block(model, layer, block)

    peak = peak_tensor_bytes(both, model.device)
    figures = {"seconds": seconds, "tape_bytes": tapes[0].nbytes, "peak_tensor_bytes": peak}
    return Plan("qwen", tuple(operations)), {**figures, "max_scratch_bytes": scratch}


def authors(model: PreTrainedModel, calibration: CalibrationSet, num_experts: int) -> dict[str, Any]:
    """Seconds of one pass through the whole model as the authors run it, LM head included, and the number of passes."""
    layers = bf.moe_layers(model)
    total = len(bf.block_of(model, layers[0]).experts.down_proj)
    passes = len(layers) * (1 + sum(range(total - num_experts + 1, total + 1)))
    bf.states_after(model, layers[-1:], calibration.ids)
    times = [timed(lambda: bf.states_after(model, layers[-1:], calibration.ids), model.device)[1] for _ in range(2)]
    return {"pass_seconds": min(times), "passes": passes, "estimated_seconds": passes * min(times)}


def profiles(model: PreTrainedModel, plan: Plan, args: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    """Seconds of surgery, and bytes and speeds before and after, in turns. The model is compressed afterwards."""
    originals, seconds = timed(lambda: execute.execute(model, plan), model.device)
    variants: dict[str, Variant] = {
        "original": lambda: moe_blocks.swap_blocks(model, originals),
        "compressed": lambda: nullcontext(model),
    }
    figures = {}
    for batch_size in args.batch_sizes:
        measured = profile_variants(
            variants,
            batch_size=batch_size,
            prompt_length=args.prompt_length,
            new_tokens=args.new_tokens,
            repetitions=args.repetitions,
            vocab_size=model.config.vocab_size,
            device=model.device,
            seed=0,
        )
        before, after = measured["original"], measured["compressed"]
        figures[str(batch_size)] = {
            "original": before.to_dict(),
            "compressed": after.to_dict(),
            "memory_ratio": after.weights_bytes / before.weights_bytes,
            "prefill_speedup": after.prefill_tokens_per_second / before.prefill_tokens_per_second,
            "decode_speedup": after.decode_tokens_per_second / before.decode_tokens_per_second,
        }
    return seconds, figures


def search_table(figures: dict[str, Any], authors_search: dict[str, Any]) -> Table:
    """The times of the search."""
    table = Table("search", "median", "min", "max", title="seconds")
    for name in ("taping", "expert_search", "layer_search"):
        times = figures[name]
        table.add_row(name.replace("_", " "), *(f"{times[key]:.2f}" for key in ("median", "min", "max")))
    passes, seconds = authors_search["passes"], authors_search["pass_seconds"]
    estimate = f"{passes} passes of {seconds:.2f}: {authors_search['estimated_seconds']:,.0f}, not run"
    table.add_row("authors' expert search", estimate, "", "")
    return table


def stage_table(figures: dict[str, Any], surgery_seconds: float) -> Table:
    """The times of MoE-I²'s stages."""
    table = Table("stage", "seconds", title="MoE-I²")
    for name, value in {**figures["seconds"], "surgery (pruning, factors)": surgery_seconds}.items():
        table.add_row(name, f"{value:.2f}")
    return table


def speed_table(figures: dict[str, Any], args: argparse.Namespace) -> Table:
    """Bytes and speeds, with the published figures if the settings are the published ones."""
    published = args.method == "cdmoe" and args.scale == "real" and (args.condense, args.experts) == (9, 4)
    title = f"{args.condense} layers condensed, {args.experts} routed experts retained"
    if args.method == "moei2":
        title = f"{args.prune_ratio:.0%} of the experts pruned, average rank {args.average_rank}"
    table = Table("batch", "", "original", "compressed", "ratio", "published", title=title)
    for batch, profile in figures.items():
        before, after = profile["original"], profile["compressed"]
        ratio = f"{PUBLISHED_RATIO} (shapes: {ARITHMETIC_RATIO})" if published else ""
        weights = [f"{side['weights_bytes'] / GIBIBYTE:.3f}" for side in (before, after)]
        table.add_row(batch, "weights, GiB", *weights, f"{profile['memory_ratio']:.4f}", ratio)
        peak = [f"{side['peak_memory_bytes'] / GIBIBYTE:.3f}" for side in (before, after)]
        table.add_row(
            "", "peak memory, GiB", *peak, f"{after['peak_memory_bytes'] / before['peak_memory_bytes']:.4f}", ""
        )
        for kind in ("prefill", "decode"):
            speeds = [f"{side[f'{kind}_tokens_per_second']:,.0f}" for side in (before, after)]
            speedup = f"{PUBLISHED_SPEEDUP:.2f}×" if published and kind == "decode" else ""
            table.add_row("", f"{kind}, tokens/s", *speeds, f"{profile[f'{kind}_speedup']:.2f}×", speedup)
    return table


def main() -> None:
    """Measure, print, write."""
    args = arguments()
    dtype = getattr(torch, args.dtype)
    model, seconds = timed(
        lambda: subjects.random_qwen(args.scale, dtype, args.device, args.implementation), args.device
    )
    calibration = texts(args, model.config.vocab_size)
    console = subjects.console()
    where = subjects.machine(args.device)
    console.print(
        f"{model.num_parameters():,} parameters, random, {args.dtype}, on {where['device']} (made in {seconds:.0f} s); "
        f"{len(calibration)} texts, {calibration.num_tokens} tokens; experts {args.implementation}"
    )
    figures: dict[str, Any] = {}
    if args.method == "cdmoe":
        plan, search_figures = search(model, calibration, args)
        figures["authors"] = authors(model, calibration, args.experts)
        console.print(search_table(search_figures, figures["authors"]))
        surgery_seconds, speeds = profiles(model, plan, args)
    else:
        plan, search_figures = stages(model, calibration, args)
        surgery_seconds, speeds = profiles(model, plan, args)
        console.print(stage_table(search_figures, surgery_seconds))
    console.print(speed_table(speeds, args))
    tape, peak = (search_figures[name] / GIBIBYTE for name in ("tape_bytes", "peak_tensor_bytes"))
    console.print(f"search: tape {tape:.2f} GiB, peak {peak:.2f} GiB without the model")
    layers = [operation.layer for operation in plan.operations]
    figures |= {"search": search_figures, "surgery_seconds": surgery_seconds, "layers": layers, "profiles": speeds}
    subjects.write_json(args.json, vars(args), where, figures)


if __name__ == "__main__":
    main()
