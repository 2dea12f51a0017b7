"""Every family × method × export format, loaded without recondense.

    python benchmarks/families.py [--families NAME ...] [--methods NAME ...] [--markdown] [--json FILE]

The methods search and compress tiny random models of transformers (of recondense for model_type deepseek). The exported
folders are loaded in an environment that has torch, transformers and safetensors alone. Their logits must be those of
the compressed model in memory (within 1e-4, fp32), and so must the tokens that they generate with a key-value cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from support.searched import METHODS, plan_of, steps_of  # noqa: E402
from support.tiny_models import EVERY, logits, recorded, tiny, windows  # noqa: E402

from recondense.config.schema import ExportConfig  # noqa: E402
from recondense.export.write_folder import write_folder  # noqa: E402
from recondense.models import families  # noqa: E402
from recondense.models.layer_shapes import layer_shapes  # noqa: E402
from recondense.plan import Plan  # noqa: E402
from recondense.surgery import execute  # noqa: E402

TOLERANCE = 1e-4
NEW_TOKENS = 8
PLAIN = ("torch", "transformers", "safetensors")
# A budget that every family of three layers can meet: a third of the experts, the same number in every layer.
THIRD = ["method.removed_expert_ratio=0.33333"]
SMALL = ["method.population=10", "method.parents=4", "method.iterations=10"]
BUDGETS: dict[str, list[str]] = {
    "none": [],
    "cdmoe": ["method.num_experts=2", "method.num_layers=1"],
    "cdmoe_s": ["method.num_layers=1"],
    "moei2": ["method.prune_ratio=0.34", "method.average_rank=4", *SMALL],
    "cdmoe_moei2": [*THIRD, "method.num_experts=[2]", "method.prune_ratios=[0.34]", "method.kept_ratios=[0.5]", *SMALL],
    "naee": [*THIRD, *SMALL],
}
# The published DeepSeek-V2 and V3 select groups of experts first; the tiny models do not.
GROUPS = {"n_group": 2, "topk_group": 2}
MODELS: dict[str, Any] = {
    **EVERY,
    "deepseek_v2, groups": partial(tiny, "deepseek_v2", topk_method="group_limited_greedy", **GROUPS),
    "deepseek_v3, groups": partial(tiny, "deepseek_v3", **GROUPS),
}
LETTERS = {"stock": "S", "bundled": "B", "dense": "D"}

# Runs in the plain environment: compares the results of every folder with the expected ones.
ELSEWHERE = """
import importlib.util, json, sys
assert all(importlib.util.find_spec(name) is None for name in ("recondense", "lightning", "datasets", "hydra", "peft"))
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
expected = torch.load(sys.argv[1], weights_only=True)
results = {}
for name, (ids, logits, tokens) in expected.items():
    folder = Path(sys.argv[1]).parent / name
    trust = {"trust_remote_code": True} if (folder / "modeling_recondense.py").exists() else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trust)
        assert not any(info.values()), info
        with torch.no_grad():
            actual = model.eval()(input_ids=ids).logits
            generated = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
                use_cache=True,
            )
        results[name] = {"difference": float((actual - logits).abs().max()), "tokens": torch.equal(generated, tokens)}
    except Exception as error:
        results[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
Path(sys.argv[2]).write_text(json.dumps(results))
""".replace("NEW", str(NEW_TOKENS))


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    python = args.python or plain_environment(ROOT / "outputs" / "cache" / "plain-environment")
    rows: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    for family in args.families:
        with tempfile.TemporaryDirectory() as folder:
            rows[family] = check_family(family, args.methods, Path(folder), python)
        wrong = [f"{method} {name}: {why}" for method, cell in rows[family].items() for name, why in failures(cell)]
        print(f"{family}: {'as the model in memory' if not wrong else '; '.join(wrong)}", flush=True)
    checks = [entry for row in rows.values() for cell in row.values() for entry in cell["formats"].values()]
    result = {
        "seconds": time.perf_counter() - started,
        "folders": len(checks),
        "largest_difference": max((entry.get("difference", 0.0) for entry in checks), default=0.0),
        "failed": sum(bool(list(failures(cell))) for row in rows.values() for cell in row.values()),
        "families": rows,
    }
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows, args.methods))
    print(LEGEND)
    print(
        f"{result['folders']} folders, {result['failed']} cases failed; largest difference of logits "
        f"{result['largest_difference']:.1e} (at most {TOLERANCE:g}); {result['seconds']:.0f} s"
    )
    for reason in dict.fromkeys(cell["refused"] for row in rows.values() for cell in row.values() if cell["refused"]):
        print(f"refused (x): {reason}")
    if args.markdown:
        print("\n" + markdown(rows, args.methods))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if result["failed"] else 0)


LEGEND = (
    "S: stock, the family's own class; B: bundled, with a modeling file; D: dense, low-rank experts multiplied out. "
    "The first letter is the format that `auto` writes. x: refused before weights are loaded."
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument(
        "--python", help="an interpreter with torch, transformers and safetensors (default: one is made)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/families.md has it")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args()


def plain_environment(folder: Path) -> str:
    """The interpreter of an environment with only the pinned torch, transformers and safetensors; made once."""
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        print(f"making an environment of {', '.join(PLAIN)}: some minutes, only once", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *PLAIN], check=True)
        (folder / "made").touch()
    return str(python)


def check_family(family: str, methods: list[str], folder: Path, python: str) -> dict[str, Any]:
    """The cells of a family, by method: why it is refused, or the results of the folder of every format."""
    cells: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    for method in methods:
        cells[method] = {"refused": refusal(MODELS[family]().config, method), "formats": {}}
        if not cells[method]["refused"]:
            expected |= export(family, method, folder, cells[method]["formats"])
    if not expected:
        return cells
    torch.save(expected, folder / "expected.pt")
    environment = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [python, "-c", ELSEWHERE, folder / "expected.pt", folder / "results.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{python}: {done.stderr[-2000:]}")
    for name, entry in json.loads((folder / "results.json").read_text(encoding="utf-8")).items():
        method, format_ = name.split("-")
        cells[method]["formats"][format_] |= entry
    return cells


def refusal(config: Any, method: str) -> str:
    """Why the method refuses a model of this config before weights are loaded; empty if it does not."""
    steps, _ = steps_of(method, *budget(method))
    return "; ".join(problem for step in steps for problem in step.check(families.facts(config)))


def budget(method: str) -> list[str]:
    return BUDGETS.get(method, THIRD)


@torch.no_grad()
def export(family: str, method: str, folder: Path, formats: dict[str, Any]) -> dict[str, Any]:
    """Export a compressed model in every format.

    Returns:
        by folder, the ids, and the logits and tokens that the folder must give for them.
    """
    model = MODELS[family]()
    plan = plan_of(model, method, folder / "search" / method, *budget(method)) if method != "none" else Plan("tiny")
    execute.execute(model, plan, lambda: recorded(model))
    ids = windows(2, 12, seed=7)
    expected = logits(model, ids)
    assert bool(torch.isfinite(expected).all()), (family, method)
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    expected_results = {}
    low_rank = any(shape.get("ranks") for shape in layer_shapes(model).values())
    for format_ in ("auto", "bundled", *(["dense"] if low_rank else [])):
        if format_ == "bundled" and formats["auto"]["kind"] == "bundled":
            continue  # the same folder
        name = f"{method}-{format_}"
        formats[format_] = {"kind": write_folder(model, None, plan, folder / name, "", ExportConfig(format=format_))}
        expected_results[name] = ids, expected, tokens
    return expected_results


def failures(cell: dict[str, Any]) -> list[tuple[str, str]]:
    """(format, problem) of every folder that differs from the model in memory."""
    problems = []
    for name, entry in cell["formats"].items():
        if "error" in entry:
            problems.append((name, entry["error"]))
        elif entry["difference"] > TOLERANCE or not entry["tokens"]:
            problems.append((name, f"logits differ by {entry['difference']:.1e}, tokens equal: {entry['tokens']}"))
    return problems


def letters(cell: dict[str, Any]) -> str:
    """The letters in a cell of the table."""
    if cell["refused"]:
        return "x"
    if failures(cell):
        return "!"
    return " ".join(LETTERS[entry["kind"] if name != "dense" else name] for name, entry in cell["formats"].items())


def table(rows: dict[str, dict[str, Any]], methods: list[str]) -> Table:
    result = Table(title="family × method × export", title_justify="left", pad_edge=False, show_edge=False)
    result.add_column("family", style="bold", no_wrap=True)
    for method in methods:
        result.add_column(method.replace("_", "\n"))
    for family, row in rows.items():
        result.add_row(family, *(letters(row[method]) for method in methods))
    return result


def markdown(rows: dict[str, dict[str, Any]], methods: list[str]) -> str:
    """The table as docs/families.md has it; methods with the same column share it."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for method in methods:
        columns.setdefault(tuple(letters(row[method]) for row in rows.values()), []).append(method)
    lines = ["| | " + " | ".join(", ".join(f"`{name}`" for name in names) for names in columns.values()) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    lines += [f"| `{family}` | " + " | ".join(column[i] for column in columns) + " |" for i, family in enumerate(rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
