"""Peak memory with model.streaming=true, for a random Qwen2-MoE that is larger than the run's limit of memory.

    python benchmarks/streaming.py [--methods cdmoe moei2] [--folder FOLDER] [--layers 20] [--limit 2GB] [--json FILE]

The model is written layer by layer, so that making it needs little memory too. Each method is one `python train.py`,
a process whose peak of resident memory the kernel reports, as `/usr/bin/time -v` does. `--beside` runs the same command
with model.streaming=false too. The method `narrow` runs with a refit. `--recovery local` refits the changed layers
and then recovers them locally.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import subjects
import torch
from rich.table import Table
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from recondense.config.types import parse_bytes
from recondense.data.stdlib import stdlib_corpora
from recondense.export.shard_writer import ShardWriter
from recondense.models import decoder
from recondense.progress import track
from recondense.run import tiny
from recondense.run.streamed_memory import SLACK

GIGABYTE = 10**9
QUICK = {
    "cdmoe": ["method.num_experts=4", "method.num_layers=2"],
    "moei2": ["method.population=20", "method.iterations=10", "method.parents=5"],
    "narrow": ["method.refit=true"],
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["cdmoe", "moei2"])
    parser.add_argument("--folder", type=Path, default=subjects.ROOT / "outputs" / "benchmarks" / "streaming")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--width", type=int, default=424, help="of a routed expert")
    parser.add_argument("--experts", type=int, default=60)
    parser.add_argument("--texts", type=int, default=8, help="calibration texts, from the standard library")
    parser.add_argument("--tokens", type=int, default=64, help="tokens at which a text is cut")
    parser.add_argument("--scratch", default="128MiB", help="max_scratch_bytes of the run")
    parser.add_argument("--recovery", default="none", choices=["none", "local"])
    parser.add_argument("--steps", type=int, default=8, help="of the local recovery, in each layer")
    parser.add_argument("--limit", default="2GB", help="of memory: a run with a higher peak fails; 0 is no limit")
    parser.add_argument("--beside", action="store_true", help="run without streaming too, for comparison")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def config_of(args: argparse.Namespace) -> Qwen2MoeConfig:
    """The config; its shared expert is as wide as four routed ones, as in Qwen1.5-MoE."""
    return Qwen2MoeConfig(
        vocab_size=8192, hidden_size=args.hidden_size, num_hidden_layers=args.layers, num_attention_heads=16,
        num_key_value_heads=16, num_experts=args.experts, num_experts_per_tok=4, moe_intermediate_size=args.width,
        intermediate_size=4 * args.width, shared_expert_intermediate_size=4 * args.width, norm_topk_prob=False,
        max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip


def folder_of(args: argparse.Namespace) -> Path:
    """The folder of the random model."""
    folder: Path = args.folder / f"model-{args.layers}x{args.experts}x{args.hidden_size}x{args.width}"
    return folder


def write_model(args: argparse.Namespace) -> None:
    """Write the random model in fp32, because bf16 is slow on most CPUs."""
    folder = folder_of(args)
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(args)
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(config)
    model.generation_config.save_pretrained(folder)
    tiny.train_tokenizer(stdlib_corpora().train or [], 2048, 1024).save_pretrained(folder)
    writer = ShardWriter(folder, GIGABYTE // 2)
    for piece in track(pieces(model), "writing the model", total=args.layers + 1):
        writer.add(revert_weight_conversion(model, piece))
    writer.finish()
    config.architectures = ["Qwen2MoeForCausalLM"]
    config.save_pretrained(folder)


def pieces(model: Qwen2MoeForCausalLM) -> Iterator[dict[str, Tensor]]:
    """Random weights of every decoder layer, then of the rest; norms are 1."""
    generator = torch.Generator().manual_seed(0)
    layers = decoder.decoder_layers(model)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    prefixes = [decoder.layer_prefix(layer) for layer in range(len(layers))]
    for prefix in [*prefixes, ""]:
        piece = [name for name in shapes if name.startswith(prefix or tuple(prefixes)) == bool(prefix)]
        yield {
            name: torch.ones(shapes[name]) if "norm" in name else torch.randn(shapes[name], generator=generator) * 0.02
            for name in piece
        }


def run(folder: Path, method: str, args: argparse.Namespace, streaming: bool) -> dict[str, Any]:
    """Run one command; return its seconds, its peak of resident bytes, and figures of its summary."""
    out = args.folder / f"{method}-{args.recovery}-{'streamed' if streaming else 'in_memory'}"
    recovery = ["method.refit=true", f"recovery.steps={args.steps}", "recovery.warmup_steps=0"]
    command = [
        *(sys.executable, str(subjects.ROOT / "train.py"), f"model.path={folder}", f"model.streaming={streaming}"),
        "data=stdlib",  # the choice of the model's family has texts of the hub
        *(f"method={method}", *QUICK.get(method, []), f"recovery={args.recovery}", f"max_scratch_bytes={args.scratch}"),
        *(f"data.calibration.num_samples={args.texts}", f"data.calibration.max_length={args.tokens}"),
        *("data=stdlib", "data.sequence_length=64", "evaluation.perplexity_windows=8", "evaluation.tasks=[]"),
        *("callbacks.profile.enabled=false", "logger.wandb.mode=disabled", "overwrite=true"),
        *(recovery if args.recovery == "local" else ()),
        *(f"run_dir={out}", f"cache_dir={out}-cache"),
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=subjects.ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)}: exit code {os.waitstatus_to_exitcode(status)}")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return {
        "peak_resident_bytes": usage.ru_maxrss * 1024,
        "seconds": seconds,
        "memory": summary.get("memory", {}),
        "perplexity": {name: stage.get("perplexity") for name, stage in summary["stages"].items()},
        "memory_ratio": summary["ratios"]["memory"],
    }


def table(figures: dict[str, dict[str, Any]], on_disk: int) -> Table:
    """A row for each run."""
    result = Table(title=f"A Qwen2-MoE of {on_disk / GIGABYTE:.2f} GB on disk")
    for column in (
        "run",
        "peak memory",
        "before the model",
        "two layers",
        "scratch",
        "to train",
        "bound",
        "seconds",
        "memory ratio",
        "perplexity",
    ):
        result.add_column(column, justify="left" if column == "run" else "right")
    for name, figure in figures.items():
        sizes = figure["memory"]
        parts = [sizes.get("before_bytes"), 2 * sizes.get("layer_bytes", 0), sizes.get("scratch_bytes")]
        parts += [sizes.get("training_bytes")]
        parts += [sum(part or 0 for part in parts) + sizes["outside_layers_bytes"] + SLACK if sizes else None]
        result.add_row(
            name,
            f"{figure['peak_resident_bytes'] / GIGABYTE:.2f} GB",
            *(f"{part / GIGABYTE:.2f} GB" if part else "" for part in parts),
            f"{figure['seconds']:.0f}",
            f"{figure['memory_ratio']:.3f}",
            " -> ".join(f"{value:.0f}" for value in figure["perplexity"].values() if value),
        )
    return result


def main() -> None:
    args = arguments()
    # In a process of its own: the kernel counts the memory of a command's parent as the command's.
    writer = multiprocessing.get_context("spawn").Process(target=write_model, args=(args,))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit("the model could not be written")
    folder = folder_of(args)
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    figures = {}
    for method in args.methods:
        figures[f"{method}, streamed"] = run(folder, method, args, True)
        if args.beside:
            figures[f"{method}, in memory"] = run(folder, method, args, False)
    subjects.console().print(table(figures, on_disk))
    subjects.write_json(args.json, vars(args), subjects.machine(), {"bytes_on_disk": on_disk, "runs": figures})
    limit = parse_bytes(args.limit)
    above = [
        name for name, figure in figures.items() if "streamed" in name and figure["peak_resident_bytes"] > limit > 0
    ]
    if above:
        raise SystemExit(f"more than {args.limit} of resident memory: {', '.join(above)}")


if __name__ == "__main__":
    main()
