"""Every family × every method × every way to export, loaded where recondense is not: python benchmarks/families.py

For each: a tiny random model made by transformers (of model_type deepseek by recondense's own class), searched and
compressed by the method, exported, and loaded in an environment that has torch, transformers and safetensors alone.
Its logits must be the live model's (1e-4, fp32), and so must the tokens that it generates with a key-value cache.
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
from recondense.export.layout import layer_shapes  # noqa: E402
from recondense.export.write_folder import write_folder  # noqa: E402
from recondense.models import families  # noqa: E402
from recondense.plan import Plan  # noqa: E402
from recondense.surgery import apply  # noqa: E402

TOLERANCE = 1e-4
NEW_TOKENS = 8
PLAIN = ("torch", "transformers", "safetensors")
# What every family can keep to, of a model with three layers: a third of the experts, as many in each layer.
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
# Published DeepSeek-V2 and V3 select groups of experts first; their small versions do not.
GROUPS = {"n_group": 2, "topk_group": 2}
MODELS: dict[str, Any] = {
    **EVERY,
    "deepseek_v2, groups": partial(tiny, "deepseek_v2", topk_method="group_limited_greedy", **GROUPS),
    "deepseek_v3, groups": partial(tiny, "deepseek_v3", **GROUPS),
}
LETTERS = {"stock": "S", "bundled": "B", "dense": "D"}

# Runs in the plain environment: what each folder computes, against what it should.
ELSEWHERE = """
import importlib.util, json, sys
assert all(importlib.util.find_spec(name) is None for name in ("recondense", "lightning", "datasets", "hydra", "peft"))
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
expected = torch.load(sys.argv[1], weights_only=True)
found = {}
for name, (ids, logits, tokens) in expected.items():
    folder = Path(sys.argv[1]).parent / name
    trust = {"trust_remote_code": True} if (folder / "modeling_recondense.py").exists() else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trust)
        assert not any(info.values()), info
        with torch.no_grad():
            own = model.eval()(input_ids=ids).logits
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
                use_cache=True,
            )
        found[name] = {"difference": float((own - logits).abs().max()), "tokens": torch.equal(made, tokens)}
    except Exception as error:
        found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
Path(sys.argv[2]).write_text(json.dumps(found))
""".replace("NEW", str(NEW_TOKENS))


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    python = args.python or plain_environment(ROOT / "outputs" / "cache" / "plain-environment")
    rows: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    for family in args.families:
        with tempfile.TemporaryDirectory() as folder:
            rows[family] = of_family(family, args.methods, Path(folder), python)
        wrong = [f"{method} {name}: {why}" for method, cell in rows[family].items() for name, why in failures(cell)]
        print(f"{family}: {'as the live model' if not wrong else '; '.join(wrong)}", flush=True)
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
    "S: as the family's own class; B: with a modeling file; D: low-rank experts multiplied out (S or B then). What "
    "`auto` writes stands first. x: refused before weights load."
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--python", help="an interpreter with torch, transformers and safetensors; else one is made")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="print the table as README has it")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args()


def plain_environment(folder: Path) -> str:
    """The interpreter of an environment with the pinned torch, transformers and safetensors alone; made once."""
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        print(f"making an environment of {', '.join(PLAIN)}: some minutes, once", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *PLAIN], check=True)
        (folder / "made").touch()
    return str(python)


def of_family(family: str, methods: list[str], folder: Path, python: str) -> dict[str, Any]:
    """By method: refused and why, or what each format's folder computes elsewhere."""
    cells: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    for method in methods:
        cells[method] = {"refused": refused(MODELS[family]().config, method), "formats": {}}
        if not cells[method]["refused"]:
            expected |= exported(family, method, folder, cells[method]["formats"])
    if not expected:
        return cells
    torch.save(expected, folder / "expected.pt")
    environment = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [python, "-c", ELSEWHERE, folder / "expected.pt", folder / "found.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{python}: {done.stderr[-2000:]}")
    for name, entry in json.loads((folder / "found.json").read_text(encoding="utf-8")).items():
        method, format_ = name.split("-")
        cells[method]["formats"][format_] |= entry
    return cells


def refused(config: Any, method: str) -> str:
    """Why a model of this config is not compressed so, as it is said before weights load; empty if it is."""
    steps, _ = steps_of(method, *budget(method))
    return "; ".join(problem for step in steps for problem in step.check(families.facts(config)))


def budget(method: str) -> list[str]:
    return BUDGETS.get(method, THIRD)


@torch.no_grad()
def exported(family: str, method: str, folder: Path, formats: dict[str, Any]) -> dict[str, Any]:
    """Folders of a compressed model in every format; what each must compute."""
    model = MODELS[family]()
    plan = plan_of(model, method, folder / "search" / method, *budget(method)) if method != "none" else Plan("tiny")
    apply.execute(model, plan, lambda: recorded(model))
    ids = windows(2, 12, seed=7)
    expected = logits(model, ids)
    assert bool(torch.isfinite(expected).all()), (family, method)
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    found = {}
    low_rank = any(shape.get("ranks") for shape in layer_shapes(model).values())
    for format_ in ("auto", "bundled", *(["dense"] if low_rank else [])):
        if format_ == "bundled" and formats["auto"]["kind"] == "bundled":
            continue  # the same folder
        name = f"{method}-{format_}"
        formats[format_] = {"kind": write_folder(model, None, plan, folder / name, "", ExportConfig(format=format_))}
        found[name] = ids, expected, tokens
    return found


def failures(cell: dict[str, Any]) -> list[tuple[str, str]]:
    """(format, what is wrong) of every folder that is not as the live model."""
    found = []
    for name, entry in cell["formats"].items():
        if "error" in entry:
            found.append((name, entry["error"]))
        elif entry["difference"] > TOLERANCE or not entry["tokens"]:
            found.append((name, f"logits differ by {entry['difference']:.1e}, tokens equal: {entry['tokens']}"))
    return found


def letters(cell: dict[str, Any]) -> str:
    """A cell of the table."""
    if cell["refused"]:
        return "x"
    if failures(cell):
        return "!"
    return " ".join(LETTERS[entry["kind"] if name != "dense" else name] for name, entry in cell["formats"].items())


def table(rows: dict[str, dict[str, Any]], methods: list[str]) -> Table:
    found = Table(title="family × method × export", title_justify="left", pad_edge=False, show_edge=False)
    found.add_column("family", style="bold", no_wrap=True)
    for method in methods:
        found.add_column(method.replace("_", "\n"))
    for family, row in rows.items():
        found.add_row(family, *(letters(row[method]) for method in methods))
    return found


def markdown(rows: dict[str, dict[str, Any]], methods: list[str]) -> str:
    """The table as README has it; methods whose column is another's stand together."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for method in methods:
        columns.setdefault(tuple(letters(row[method]) for row in rows.values()), []).append(method)
    lines = ["| | " + " | ".join(", ".join(f"`{name}`" for name in names) for names in columns.values()) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    lines += [f"| `{family}` | " + " | ".join(column[i] for column in columns) + " |" for i, family in enumerate(rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
