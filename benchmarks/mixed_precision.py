"""Training steps with fp32 weights and products in bf16: grouped experts against transformers' one after another.

    python benchmarks/mixed_precision.py [--layers 6] [--experts 16] [--width 64] [--hidden 576] [--turns 6]

A step is a forward and a backward pass of two windows of 256 random tokens, all weights trained. The two ways take
turns; the ratio is that of their fastest steps. On a CPU, oneDNN compiles a product for each number of tokens of an
expert; the warm-up compiles many of them.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")  # by default it keeps 1,024

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from recondense.models.autocast_experts import autocast_experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 6), ("experts", 16), ("width", 64), ("hidden", 576), ("turns", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    config = Qwen2MoeConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        moe_intermediate_size=args.width,
        shared_expert_intermediate_size=8 * args.width,
        num_experts=args.experts,
        num_experts_per_tok=4,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(config).to(device)
    seconds: dict[str, list[float]] = {"eager": [], "grouped_mm": []}
    for turn in range(2 + args.turns):
        for experts, times in seconds.items():
            model.set_experts_implementation(experts)
            with autocast_experts(model):
                times.append(step(model, torch.randint(0, config.vocab_size, (2, 256), device=device)))
        if turn < 2:
            print(f"warm-up: { ({name: round(times[-1], 3) for name, times in seconds.items()}) } s")
    best = {name: min(times[2:]) for name, times in seconds.items()}
    print(f"a step: one after another {best['eager']:.3f} s, grouped {best['grouped_mm']:.3f} s: ", end="")
    print(f"{best['eager'] / best['grouped_mm']:.2f} times as fast")


def step(model: Qwen2MoeForCausalLM, input_ids: torch.Tensor) -> float:
    """Return the seconds of a forward and a backward pass."""
    model.zero_grad()
    start = time.perf_counter()
    with torch.autocast(input_ids.device.type, torch.bfloat16):
        loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    if input_ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
