"""CD-MoE's search compared with the authors' procedure: time, layer runs, memory and the plan.

    python benchmarks/search.py [--json FILE] [--model FOLDER] [--texts 20] [--tokens 96] [--experts 4]
    python benchmarks/search.py --method moei2      MoE-I²'s genetic search: see search_moei2.py

The authors' procedure (tests/support/brute_force.py) runs the whole model for every candidate. Both sides use the same
texts in the same batches of 8, in one process with the same threads. The second half repeats the comparison with more
experts: the trained model is upcycled, with several perturbed copies of every expert and router row.

Memory is the peak of tensor bytes without the model, by torch's profiler, in runs that are not timed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import search_moei2
import subjects
import torch
from rich.table import Table
from subjects import timed
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.config.schema import Config
from recondense.config.types import parse_bytes
from recondense.evaluation.profiling import peak_tensor_bytes
from recondense.methods.cdmoe import CDMoE
from recondense.methods.step import SearchContext
from recondense.progress import track
from recondense.run.search_memory import scratch_bytes

sys.path.insert(0, str(subjects.ROOT / "tests"))
from support import brute_force as bf
from support.agreement import TOLERANCE, Agreement, compare

HEADS = {"with_head": True, "without_head": False}
MEBIBYTE = 2**20


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("cdmoe", "moei2"), default="cdmoe", help="moei2: see search_moei2.py")
    parser.add_argument("--model", type=Path, help="folder of a Qwen2-MoE (default: the embedded model)")
    parser.add_argument("--texts", type=int, default=20, help="calibration texts, from the standard library")
    parser.add_argument("--tokens", type=int, default=96, help="tokens at which a text is cut")
    parser.add_argument("--experts", type=int, default=4, help="routed experts to choose in every layer")
    parser.add_argument("--many-experts", type=int, default=60, help="experts of the second half; 0 skips it")
    parser.add_argument("--layers", type=int, help="to save time, the authors' side searches only this many layers")
    parser.add_argument("--repeats", type=int, default=6, help="timed repetitions of our side; the authors' runs once")
    parser.add_argument("--shared-gate", choices=("mean", "token"), default="mean")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--implementation", choices=("auto", "eager", "grouped_mm"), default="auto", help="of experts")
    parser.add_argument("--max-scratch-bytes", default="auto", help="our bound on temporary tensors, as in train.py")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    if args.max_scratch_bytes != "auto":
        args.max_scratch_bytes = parse_bytes(args.max_scratch_bytes)
    return args


class Sides:
    """One model and its texts, which both sides search."""

    def __init__(self, model: PreTrainedModel, ids: bf.Ids, args: argparse.Namespace) -> None:
        self.model = model
        self.ids = ids
        self.args = args
        self.moe_layers = bf.moe_layers(model)
        self.compared = self.moe_layers[: args.layers]
        self.scratch = scratch_bytes(Config(max_scratch_bytes=args.max_scratch_bytes), model.device)

    def tape(self) -> Tape:
        """Our tape, in the authors' batches."""
        return Tape.record(self.model, bf.batches(self.model, self.ids, bf.BATCH_SIZE))

    def ours(
        self, num_layers: int | str, tape: Tape | None = None, cache: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Our search's record: the expert search of all layers, then the layer search if `num_layers` is a number."""
        tape = self.tape() if tape is None else tape
        step = CDMoE(self.args.experts, num_layers, self.args.shared_gate)
        context = SearchContext(self.model, lambda: tape, {} if cache is None else cache, self.scratch)
        _, record = step.search(context)
        return record

    def authors(self, lm_head: bool, layers: list[int], num_experts: int) -> tuple[dict[int, bf.Order], Any]:
        """The authors' expert search: an order for each layer, and the statistics."""
        stats = bf.statistics(self.model, self.ids)
        original = bf.states_after(self.model, layers, self.ids, lm_head=lm_head)
        settings: dict[str, Any] = {"shared_gate": self.args.shared_gate, "lm_head": lm_head}
        title = f"the authors' procedure {'with' if lm_head else 'without'} LM head"
        orders = {}
        for layer in track(layers, title):
            settings["original"] = original[layer]
            orders[layer] = bf.expert_search(self.model, self.ids, layer, num_experts, stats[layer], **settings)
        return orders, stats


def expert_searches(sides: Sides) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Time both expert searches, ours before and after the authors', so that a slow minute affects both."""
    repeats = sides.args.repeats
    record = sides.ours("all")  # a warm-up
    bf.states_after(sides.model, sides.compared, sides.ids)  # a warm-up
    ours = [timed(lambda: sides.ours("all"))[1] for _ in range((repeats + 1) // 2)]
    scale = len(sides.moe_layers) / len(sides.compared)
    authors = {}
    for name, lm_head in HEADS.items():
        (orders, stats), seconds = timed(partial(sides.authors, lm_head, sides.compared, sides.args.experts))
        authors[name] = seconds * scale
    ours += [timed(lambda: sides.ours("all"))[1] for _ in range(repeats // 2)]
    searches = record["expert_search"]
    agreements = [
        compare(order, searches[str(layer)]["order"], searches[str(layer)]["js"]) for layer, order in orders.items()
    ]
    times = subjects.spread(ours)
    figures = {
        "authors_seconds": authors,
        "authors_passes": sum(order.count.passes for order in orders.values()),
        "authors_layers_run": len(sides.compared),  # if these are not all, the authors' seconds are scaled up
        "recondense_seconds": times,
        "recondense_taping_seconds": min(timed(sides.tape)[1] for _ in range(3)),
        "speedup": {name: seconds / times["median"] for name, seconds in authors.items()},
        **summarize(agreements),
    }
    return figures, searches, stats


def layer_searches(sides: Sides, searches: dict[str, Any], stats: Any) -> dict[str, Any]:
    """Time both layer searches over all layers with the same experts, and count the decoder layers that run."""
    experts = {layer: searches[str(layer)]["order"] for layer in sides.moe_layers}
    tape, cache = sides.tape(), dict[str, Any]()
    sides.ours("all", tape, cache)  # fills the cache with the experts
    records = [sides.ours(len(experts), tape, dict(cache)) for _ in range(4)][1:]
    ours = records[0]["layer_search"]
    figures: dict[str, Any] = {
        "recondense_seconds": subjects.spread([record["seconds"]["layer_search"] for record in records]),
        "recondense_layer_runs": ours["layer_runs"],
        "authors_seconds": {},
    }
    settings: dict[str, Any] = {"shared_gate": sides.args.shared_gate}
    for name, lm_head in HEADS.items():
        search = partial(bf.layer_search, sides.model, sides.ids, len(experts), experts, stats, lm_head=lm_head)
        order, figures["authors_seconds"][name] = timed(partial(search, **settings))
    figures["authors_layer_runs"] = order.count.layer_runs
    figures["layer_run_ratio"] = ours["layer_runs"] / order.count.layer_runs
    return figures | summarize([compare(order, ours["order"], ours["js"])])


def summarize(agreements: list[Agreement]) -> dict[str, Any]:
    """Whether the plans are the same, over several orders."""
    return {
        "same_plan": all(agreement.same_plan for agreement in agreements),
        "identical_orders": sum(agreement.same_order for agreement in agreements),
        "compared_orders": len(agreements),
        "ties": sum(agreement.num_ties for agreement in agreements),
        "largest_relative_difference": max(agreement.largest_difference for agreement in agreements),
        "problems": [problem for agreement in agreements for problem in agreement.problems],
    }


def peaks(sides: Sides) -> dict[str, int]:
    """Peaks of tensor bytes without the model.

    The authors' side searches one expert of one layer, because every candidate of every layer needs the same memory.
    """
    work: dict[str, Callable[[], Any]] = {
        name: partial(sides.authors, lm_head, sides.compared[-1:], 1) for name, lm_head in HEADS.items()
    }
    work["recondense"] = partial(sides.ours, len(sides.moe_layers))
    return {name: peak_tensor_bytes(search, sides.model.device) for name, search in work.items()}


def measure(model: PreTrainedModel, ids: bf.Ids, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    sides = Sides(model, ids, args)
    experts, searches, stats = expert_searches(sides)
    return {
        "model": {
            "num_experts": len(stats[sides.moe_layers[0]].selected),
            "moe_layers": len(sides.moe_layers),
            "parameters": model.num_parameters(),
            "experts_never_selected": sum(count == 0 for statistics in stats.values() for count in statistics.selected),
        },
        "expert_search": experts,
        "layer_search": layer_searches(sides, searches, stats),
        "peak_tensor_bytes": peaks(sides),
    }


def table(name: str, case: dict[str, Any]) -> Table:
    """The figures of one model, the authors' and ours."""
    facts, experts, layers = case["model"], case["expert_search"], case["layer_search"]
    size = f"{facts['moe_layers']} MoE layers of {facts['num_experts']} experts, {facts['parameters']:,} parameters"
    result = Table("", "authors', with LM head", "authors', without", "recondense", title=f"{name}: {size}")
    partial = experts["authors_layers_run"] < facts["moe_layers"]
    mark = f" (scaled up from {experts['authors_layers_run']} layers)" if partial else ""
    speedups = [f"{value:.0f} times ours" for value in experts["speedup"].values()]
    taping = f"1, and each layer once (taping: {experts['recondense_taping_seconds']:.3f} s)"
    ratio = f"{layers['recondense_layer_runs']} ({layers['layer_run_ratio']:.0%})"
    peak = [f"{value / MEBIBYTE:.1f}" for value in case["peak_tensor_bytes"].values()]
    result.add_row(f"expert search, s{mark}", *time_cells(experts))
    result.add_row("", *speedups, "")
    result.add_row("whole-model passes", *[str(experts["authors_passes"])] * 2, taping)
    result.add_row("same plan?", "", "", describe(experts), end_section=True)
    result.add_row("layer search, s", *time_cells(layers))
    result.add_row("decoder layers run", *[str(layers["authors_layer_runs"])] * 2, ratio)
    result.add_row("same plan?", "", "", describe(layers), end_section=True)
    result.add_row("peak of tensors, MiB", *peak)
    return result


def time_cells(figures: dict[str, Any]) -> list[str]:
    """The time cells of a row."""
    ours = figures["recondense_seconds"]
    authors = [f"{value:.2f}" for value in figures["authors_seconds"].values()]
    return [*authors, f"{ours['median']:.3f} ({ours['min']:.3f} to {ours['max']:.3f})"]


def describe(figures: dict[str, Any]) -> str:
    """Whether the plans are the same, in words."""
    if not figures["same_plan"]:
        return "NO: " + "; ".join(figures["problems"])
    orders = f"{figures['identical_orders']} of {figures['compared_orders']} orders identical, {figures['ties']} ties"
    return f"yes: {orders}, scores within {figures['largest_relative_difference']:.0e} relative"


def main() -> None:
    """Measure, print, write."""
    method = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    method.add_argument("--method")
    if method.parse_known_args()[0].method == "moei2":
        search_moei2.main()
        return
    args = arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = subjects.load(args.model, dtype=args.dtype, device="cpu", experts=args.implementation)
    ids = subjects.standard_library(tokenizer, args.texts, args.tokens).ids
    models = {"trained": model}
    if args.many_experts:
        models["upcycled"] = subjects.upcycle(model, args.many_experts)
    console = subjects.console()
    console.print(
        f"{len(ids)} texts of {min(map(len, ids))} to {max(map(len, ids))} tokens, {args.experts} experts in every "
        f"layer, shared gate {args.shared_gate}, {args.dtype}, experts {model.config._experts_implementation}, "
        f"{torch.get_num_threads()} threads. Same plan: the same choice wherever scores differ by more than "
        f"{TOLERANCE:g} relative, and equal scores everywhere."
    )
    cases = {}
    for name, searched_model in models.items():
        cases[name] = measure(searched_model, ids, args)
        console.print(table(name, cases[name]))
    subjects.write_json(args.json, vars(args), subjects.machine(), {"cases": cases})
    if not all(case[part]["same_plan"] for case in cases.values() for part in ("expert_search", "layer_search")):
        raise SystemExit("the plans differ")


if __name__ == "__main__":
    main()
