"""Training steps of a recovery, by recondense and by others: real tokens per second, peak memory and losses.

    python benchmarks/training.py [--json FILE] [--texts FILE] [--rounds 4] [--steps 3] [--only NAME ...]
    python benchmarks/training.py --only shared checkpointed compiled bf16_mixed unfused    what the settings change

The upper half of the layers of a Qwen2-MoE with random weights is condensed. Only the experts of condensed layers
train, with AdamW. Each contestant is a process of its own. They take turns of a few steps, in one order and then in the
reverse order, so that a slow minute of the machine affects all of them. Padding does not count as tokens.

If the machine has other work too, use --threads 1 and compare tokens per second of CPU time.

Memory is counted in tensors, as CUDA's allocator does: those alive between steps, and the most that a step adds,
forward and backward. The table also has the peak of resident memory after set-up, and the same without what was
resident after the imports; both include unused memory of malloc's heap. Recoveries of recondense run as in train.py:
if training does not need the original, it is offloaded to the disk until the final comparison.

    (a) transformers' Trainer on the same condensed model: the authors' fine-tuning, each text cut at the length and
        padded to it, and fine-tuning on the same packed windows as ours
    (b) distillation with two whole models and full logits, in a plain loop
    (c) distillation on one shared backbone, in two passes with full logits (the loss of TRL's GKD)

Texts are the `text` of the lines of a .jsonl file, or the top-level definitions of Python's standard library.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import subjects
import torch
from rich.table import Table
from training_contestants import SETTINGS, run_contestant, tokenize_texts

TITLES = {
    "finetune": "recondense: fine-tuning",
    "trainer_padded": "(a) Trainer, padded texts",
    "trainer_packed": "(a) Trainer, packed texts",
    "shared": "recondense: teacher shared",
    "cached": "recondense: teacher cached",
    "model": "recondense: teacher a model",
    "two_models": "(b) two whole models",
    "full_logits": "(c) shared, full logits",
    "checkpointed": "... activation checkpointing",
    "compiled": "... trainer.compile",
    "bf16_mixed": "... precision=bf16-mixed",
    "unfused": "... fused_optimizer=false",
}
# Not slower than the packed Trainer, up to the noise of a ratio.
AT_LEAST = {
    "finetune/trainer_padded speed": 1.2,
    "finetune/trainer_packed speed": 0.95,
    "shared/two_models speed": 1.25,
}
AT_MOST = {
    "finetune/trainer_padded memory": 1.0,
    "shared/two_models memory": 0.7,
    "shared largest difference of losses": 1e-5,
}
MIB = 2**20


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help=".jsonl with `text` (default: the standard library's definitions)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=TITLES,
        default=[name for name in TITLES if name not in SETTINGS],
        help="contestants",
    )
    parser.add_argument("--rounds", type=int, default=4, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window; longer texts are cut")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--num-experts", type=int, default=60)
    parser.add_argument("--width", type=int, default=256, help="of a routed expert; a shared one is four times as wide")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--show-only", action="store_true", help="judge nothing")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def measure(args: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    """Give the contestants their turns; tokens per second is the median over the rounds."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    for name in args.only:
        pipes[name], child_end = context.Pipe()
        process = context.Process(target=run_contestant, args=(name, args, data, child_end), daemon=True)
        process.start()
        child_end.close()
        pipes[name].recv()  # until it is set up
    speeds: dict[str, list[float]] = {name: [] for name in args.only}
    cpu_speeds: dict[str, list[float]] = {name: [] for name in args.only}
    for round_ in range(args.rounds + 1):
        for name in args.only[:: 1 if round_ % 2 else -1]:
            pipes[name].send(args.steps if round_ else 2)  # the first round is a warm-up
            seconds, cpu_seconds, tokens = pipes[name].recv()
            if round_:
                speeds[name].append(tokens / seconds)
                cpu_speeds[name].append(tokens / cpu_seconds)
                print(f"{name}: {tokens} tokens in {seconds:.1f} s ({cpu_seconds:.1f} of CPU)", file=sys.stderr)
    figures = {}
    for name, pipe in pipes.items():
        pipe.send(0)
        report = pipe.recv()
        figures[name] = {
            **report,
            "tokens_per_second": subjects.spread(speeds[name]),
            "tokens_per_cpu_second": subjects.spread(cpu_speeds[name]),
        }
    return figures


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Ratios of ours to the others in speed and memory, and the largest differences of the losses."""
    values: dict[str, float] = {}
    pairs = [("finetune", "trainer_padded"), ("finetune", "trainer_packed"), ("shared", "two_models")]
    pairs += [("shared", "full_logits"), ("cached", "two_models"), *((name, "shared") for name in SETTINGS)]
    for ours, other in pairs:
        if ours in figures and other in figures:
            speeds = [figures[name]["tokens_per_second"]["median"] for name in (ours, other)]
            tensors = [figures[name]["tensor_bytes"] for name in (ours, other)]
            resident = [figures[name]["peak_bytes"] for name in (ours, other)]
            over_imports = [figures[name]["peak_bytes_over_imports"] for name in (ours, other)]
            cpu_speeds = [figures[name]["tokens_per_cpu_second"]["median"] for name in (ours, other)]
            values[f"{ours}/{other} speed"] = speeds[0] / speeds[1]
            values[f"{ours}/{other} speed by CPU time"] = cpu_speeds[0] / cpu_speeds[1]
            values[f"{ours}/{other} memory"] = tensors[0] / tensors[1]
            values[f"{ours}/{other} resident"] = resident[0] / resident[1]
            values[f"{ours}/{other} resident over imports"] = over_imports[0] / over_imports[1]
    curves = {name: figures[name]["losses"] for name in ("shared", "two_models", "full_logits", "model", "cached")
              if name in figures}  # fmt: skip
    reference = curves.get("two_models", [])
    for name, losses in curves.items():
        if reference and name != "two_models":
            both = list(zip(losses, reference, strict=False))
            values[f"{name} first loss"], values["two_models first loss"] = both[0]
            values[f"{name} largest difference of losses"] = max(abs(a - b) / b for a, b in both)
    return values


def table(figures: dict[str, Any]) -> Table:
    """A row for each contestant."""
    result = Table(
        "",
        "real tokens/s",
        "per CPU second",
        "tensors, MiB",
        "resident",
        "over imports",
        "first loss",
        title="training step",
    )
    for name, figure in figures.items():
        speed = figure["tokens_per_second"]
        cells = [
            f"{speed['median']:.0f} ({speed['min']:.0f} to {speed['max']:.0f})",
            f"{figure['tokens_per_cpu_second']['median']:.0f}",
            *(f"{figure[size] / MIB:.0f}" for size in ("tensor_bytes", "peak_bytes", "peak_bytes_over_imports")),
        ]
        result.add_row(TITLES[name], *cells, f"{figure['losses'][0]:.6f}" if figure["losses"] else "")
    return result


def bounds(figures: dict[str, Any]) -> list[str]:
    """The memory that recoveries need by their sizes alone, with the gradients and AdamW's two moments."""
    lines = []
    ours = figures.get("shared") or {}
    if ours:
        states = 4 * ours["trained_bytes"]  # weights, gradient, two moments
        dropped = ours["student_and_original_bytes"] - ours["student_bytes"]
        lines.append(
            f"original {ours['original_bytes'] / MIB:.0f} MiB; trained parameters with their states "
            f"{states / MIB:.0f}; part of the original that the student does not use {dropped / MIB:.0f}"
        )
        for name in ("shared", "cached"):
            if name in figures:
                size = ours["original_bytes"] + states - (dropped if name == "cached" else 0)
                measured, step = figures[name]["tensor_bytes"], figures[name]["step_bytes"]
                lines.append(
                    f"{name}: weights and states {size / MIB:.0f} MiB, a step's tensors {step / MIB:.0f}, "
                    f"together {(size + step) / MIB:.0f}; measured {measured / MIB:.0f}"
                )
    return lines


def main() -> None:
    """Measure, print, write."""
    args = arguments()
    torch.set_num_threads(args.threads)
    data = tokenize_texts(args)
    lengths = torch.tensor([float(len(ids)) for ids in data["cut"]])
    console = subjects.console()
    text_share = float(lengths.mean() / args.length)
    console.print(
        f"{len(lengths)} texts, cut at {args.length} tokens: {lengths.mean():.0f} tokens on average, so padded windows "
        f"are {text_share:.0%} text; {len(data['packed'])} packed windows; batches of {args.batch_size}; "
        f"{args.threads} threads"
    )
    figures = measure(args, data)
    comparison = ratios(figures)
    console.print(table(figures))
    for name, value in comparison.items():
        console.print(f"{name}: {value:.6g}")
    for line in bounds(figures):
        console.print(line)
    subjects.write_json(
        args.json,
        vars(args),
        subjects.machine(),
        {"text_share": text_share, "contestants": figures, "ratios": comparison},
    )
    missed = [
        f"{name} {comparison[name]:.4g} < {limit}"
        for name, limit in AT_LEAST.items()
        if comparison.get(name, limit) < limit
    ]
    missed += [
        f"{name} {comparison[name]:.4g} > {limit}"
        for name, limit in AT_MOST.items()
        if comparison.get(name, limit) > limit
    ]
    if missed and not args.show_only:
        raise SystemExit(f"missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
