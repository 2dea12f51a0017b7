"""A search by one process and by two, with one thread each: seconds, and whether the plan files are the same.

    python benchmarks/processes.py [--methods cdmoe moei2 reap] [--texts 32] [--repeats 3] [--json FILE]

Every run is one process, or two over gloo, that make the same random Qwen2-MoE, wait for each other, and then time
calibration and search. One and two processes take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import subjects
import torch
from rich.table import Table

from recondense import processes
from recondense.calibration.tape import Tape
from recondense.files import JsonFolder
from recondense.methods.cdmoe import CDMoE
from recondense.methods.moei2 import InterExpertPruning
from recondense.methods.saliency import SaliencyPruning
from recondense.methods.search.budget import Budget
from recondense.methods.search.genetic import Genetic
from recondense.methods.step import SearchContext
from recondense.plan import Plan

AT_MOST = 0.65  # of one process's seconds
ONE_PASS = 4  # times as many texts for methods that run them once
STEPS: dict[str, Any] = {
    "cdmoe": lambda: CDMoE(4, 3),
    "moei2": lambda: InterExpertPruning(genetic=Genetic(population=40, iterations=20, parents=10, search="genetic")),
    "reap": lambda: SaliencyPruning("reap", budget=Budget(removed_expert_ratio=0.25)),
}
SIZES = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 8, "num_experts": 16, "moe_intermediate_size": 128}
SIZES |= {"shared_expert_intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--texts", type=int, default=32, help="calibration texts of random tokens")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a text")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--worker", nargs=4, metavar=("METHOD", "RANK", "WORLD", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def num_texts(args: argparse.Namespace, method: str) -> int:
    """The number of texts; more for a method whose run would otherwise be too short to time."""
    return args.texts * ONE_PASS if method == "reap" else int(args.texts)


def search(args: argparse.Namespace) -> None:
    """Search as one of the processes of a run; the first writes the plan and the seconds."""
    method, folder = args.worker[0], Path(args.worker[3])
    rank, world = map(int, args.worker[1:3])
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=world)
    subjects.TINY.update(SIZES | {"num_hidden_layers": args.layers})
    model = subjects.random_qwen("tiny", torch.float32, "cpu", "grouped_mm")
    blocks = list(subjects.random_texts(SIZES["vocab_size"], num_texts(args, method), args.tokens).batches(8))
    processes.barrier()
    started = time.perf_counter()
    tape = Tape.record(model, blocks, split=True)
    cache = processes.SharedMapping(JsonFolder(folder / "cache"))
    operations, record = STEPS[method]().search(SearchContext(model, lambda: tape, cache, 1 << 28))
    seconds = time.perf_counter() - started
    if processes.is_first():
        decided = {name: value for name, value in record.items() if name not in ("seconds", "reused")}
        Plan(method, tuple(operations), search=decided).save(folder / "plan.json")
        (folder / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def run_once(args: argparse.Namespace, method: str, world: int) -> tuple[float, str]:
    """Run a search with one or two processes; return its seconds and its plan."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--texts", str(args.texts), "--tokens", str(args.tokens), "--layers", str(args.layers)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [sys.executable, __file__, *sizes, "--worker", method, str(rank), str(world), folder], env=env
            )
            for rank in range(world)
        ]
        if any([process.wait() for process in started]):
            raise SystemExit(f"{method}: a process of {world} failed")
        seconds = json.loads((Path(folder) / "seconds.json").read_text(encoding="utf-8"))
        return float(seconds), (Path(folder) / "plan.json").read_text(encoding="utf-8")


def main() -> None:
    args = arguments()
    if args.worker:
        search(args)
        return
    rows = []
    for method in args.methods:
        seconds: dict[int, list[float]] = {1: [], 2: []}
        plans = set()
        for repeat in range(args.repeats):
            for world in (1, 2) if repeat % 2 == 0 else (2, 1):
                run_seconds, plan = run_once(args, method, world)
                seconds[world].append(run_seconds)
                plans.add(plan)
        one, two = (min(seconds[world]) for world in (1, 2))
        sizes = {"method": method, "texts": num_texts(args, method)}
        rows.append({**sizes, "one": seconds[1], "two": seconds[2], "ratio": two / one, "plans": len(plans)})
    table = Table(title="Calibration and search, one thread a process")
    for column in ("method", "texts", "one process, s", "two, s", "two / one", "plans"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        same = "the same file" if row["plans"] == 1 else f"{row['plans']} different ones"
        fastest = [f"{min(row[name]):.2f}" for name in ("one", "two")]
        table.add_row(row["method"], str(row["texts"]), *fastest, f"{row['ratio']:.2f}", same)
    subjects.console().print(table)
    subjects.write_json(args.json, vars(args), subjects.machine(), {"rows": rows})
    wrong = [row["method"] for row in rows if row["plans"] > 1 or row["ratio"] > AT_MOST]
    if wrong:
        raise SystemExit(f"not the same plan, or more than {AT_MOST} of one process's time: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
