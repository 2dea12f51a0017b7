"""Prefill and decode before and after compression, over batch sizes.

    python benchmarks/inference.py [--batch-sizes 1 4 16] [--device cuda] [--json FILE]

The models are a Qwen2-MoE with random weights and three compressed versions: the upper half of its layers condensed to
the shared and four routed experts, a quarter of all experts pruned, and the remaining experts factorized too. They
share one backbone and are timed in turns; speeds are medians. Random weights distribute tokens evenly over experts.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import subjects
import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from recondense.evaluation.profiling import Variant, profile_variants
from recondense.methods.decompose import Decompose
from recondense.models import moe_blocks
from recondense.operations import Condense, Operation, Prune
from recondense.plan import Plan
from recondense.surgery import execute

MEBIBYTE = 2**20
KINDS = ("prefill", "decode")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--width", type=int, default=352, help="of a routed expert")
    parser.add_argument("--experts", type=int, default=60)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def original(args: argparse.Namespace) -> PreTrainedModel:
    """The original model; its shared expert is as wide as four routed ones."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=8192, hidden_size=args.hidden_size, num_hidden_layers=args.layers, num_attention_heads=8,
        num_key_value_heads=8, num_experts=args.experts, num_experts_per_tok=4, moe_intermediate_size=args.width,
        intermediate_size=4 * args.width, shared_expert_intermediate_size=4 * args.width, norm_topk_prob=False,
    )  # fmt: skip
    with torch.device(args.device):
        model = Qwen2MoeForCausalLM(config).to(getattr(torch, args.dtype)).eval()
    model.set_experts_implementation("grouped_mm")
    return model


def compress(model: PreTrainedModel, operations: list[Operation]) -> dict[int, nn.Module]:
    """The blocks after a plan, by layer; the model does not change."""
    originals = execute.execute(model, Plan("random", tuple(operations)))
    blocks = {layer: moe_blocks.get_block(model, layer) for layer in originals}
    for layer, block in originals.items():
        moe_blocks.set_block(model, layer, block)
    return blocks


def variants(model: PreTrainedModel) -> dict[str, Variant]:
    """The original and its compressed versions."""
    blocks = moe_blocks.sparse_blocks(model)
    upper = list(blocks)[len(blocks) // 2 :]
    condense: list[Operation] = [Condense(layer, (0, 1, 2, 3), (0.06,) * 4, 0.5) for layer in upper]
    prune: list[Operation] = [
        Prune.from_dropped(layer, block.num_experts, range(block.num_experts // 4)) for layer, block in blocks.items()
    ]
    pruned = compress(model, prune)
    with moe_blocks.swap_blocks(model, pruned):
        factorize = Decompose(alpha=0.0).outline(model)
    compressed = {
        "upper half condensed": compress(model, condense),
        "a quarter pruned": pruned,
        "pruned and factorized": compress(model, [*prune, *factorize]),
    }

    def variant(replacements: dict[int, nn.Module]) -> Variant:
        return lambda: moe_blocks.swap_blocks(model, replacements)

    versions = {name: variant(replacements) for name, replacements in compressed.items()}
    return {"original": lambda: nullcontext(model), **versions}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Profiles of every variant, by batch size."""
    model = original(args)
    all_variants = variants(model)
    return {
        str(batch_size): {
            name: profile.to_dict()
            for name, profile in profile_variants(
                all_variants,
                batch_size=batch_size,
                prompt_length=args.prompt_length,
                new_tokens=args.new_tokens,
                repetitions=args.repetitions,
                vocab_size=model.config.vocab_size,
                device=model.device,
                seed=0,
            ).items()
        }
        for batch_size in args.batch_sizes
    }


def table(figures: dict[str, Any]) -> Table:
    """A row for each variant and batch size, with speeds relative to the original's."""
    table = Table("batch", "model", title="Tokens per second, and relative to the original")
    for column in ("weights, MiB", "peak, MiB", *KINDS):
        table.add_column(column, justify="right")
    for batch_size, profiles in figures.items():
        for name, profile in profiles.items():
            speeds = [profile[f"{kind}_tokens_per_second"] for kind in KINDS]
            originals = [profiles["original"][f"{kind}_tokens_per_second"] for kind in KINDS]
            table.add_row(
                batch_size,
                name,
                *(f"{profile[size] / MEBIBYTE:,.0f}" for size in ("weights_bytes", "peak_memory_bytes")),
                *(f"{speed:,.0f} ({speed / original:.2f}x)" for speed, original in zip(speeds, originals, strict=True)),
            )
        table.add_section()
    return table


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    figures = measure(args)
    subjects.console().print(table(figures))
    subjects.write_json(args.json, vars(args), subjects.machine(args.device), {"batch_sizes": figures})


if __name__ == "__main__":
    main()
