"""How many steps of distillation a local recovery saves, on the demo's model.

    python benchmarks/local_recovery.py [--steps 200] [--local 200] [--shorter 25 50 100] [--json FILE]

The model is compressed as in the demo. Measured are the KL divergence from the original and the processor seconds of
refit and training: after distillation alone; after local recovery alone with both choices of `local_inputs`, each with
and without a refit before it; and after shorter distillations, which start from the refitted model and from the best of
the local recoveries. A step has the same tokens everywhere. Trials that FILE has are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import subjects
from rich.table import Table

import recondense as rc
from recondense.data.stdlib import stdlib_corpora
from recondense.plan import Plan
from recondense.run.refits import plan_refits

# The settings of conf/model/tiny_moe.yaml
SETTINGS: dict[str, Any] = {"batch_size": 4, "learning_rate": 3e-3, "schedule": "cosine"}
WARMUP = 20
Trial = dict[str, Any]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of the model; without it the demo's, trained if it is not there")
    parser.add_argument("--steps", type=int, default=200, help="of the distillation to compare with")
    parser.add_argument("--local", type=int, nargs="+", default=[50, 200], help="steps of the local recovery")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3], help="learning rates of the local recovery")
    parser.add_argument("--shorter", type=int, nargs="+", default=[25, 50, 100], help="steps of shorter distillations")
    parser.add_argument("--shorter-rates", type=float, nargs="+", default=[3e-3, 5e-4], help="their learning rates")
    parser.add_argument("--windows", type=int, default=64, help="validation windows of 256 tokens")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


class Trials:
    """Trainings of copies of one compressed model.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = subjects.load(args.folder)
        corpora = stdlib_corpora()
        self.train, self.calibration = corpora.train or [], corpora.calibration or []
        self.validation = self._first_texts(corpora.validation or [], 257 * args.windows)
        tape = rc.calibrate(self.model, self.tokenizer, self.calibration)
        self.plan = rc.search(tape, rc.CDMoE(num_experts=4))
        self.finished: list[Trial] = []
        if args.json is not None and args.json.exists():
            self.finished = json.loads(args.json.read_text(encoding="utf-8"))["trials"]

    def _first_texts(self, texts: Sequence[str], tokens: int) -> list[str]:
        used = []
        for text in texts:
            if tokens > 0:
                used.append(text)
                tokens -= len(self.tokenizer(text, verbose=False)["input_ids"])
        return used

    def run(self, name: str, refit: bool, *stages: dict[str, Any]) -> Trial:
        """Compress a copy of the model, train it in stages, and measure it."""
        for trial in self.finished:
            if trial["name"] == name:
                return trial
        model = copy.deepcopy(self.model)
        refits = plan_refits(self.plan.operations, refit)
        started = time.process_time()
        tape = rc.calibrate(model, self.tokenizer, self.calibration) if refit else None
        student = rc.apply(model, Plan(self.plan.model, (*self.plan.operations, *refits)), tape)
        for settings in stages:
            warmup = min(WARMUP, settings["steps"] - 1)
            rc.recover(student, self.tokenizer, self.train, **{**SETTINGS, "warmup_steps": warmup, **settings})
        seconds = time.process_time() - started
        figures = rc.evaluate(student, self.tokenizer, self.validation)
        trial = {"name": name, "refit": refit, "stages": list(stages), "seconds": seconds, **figures}
        self.finished.append(trial)
        return trial

    def all(self) -> Iterator[Trial]:
        """Run every trial."""
        args = self.args
        yield self.run("nothing", False)
        yield self.run("refit", True)
        yield self.run(f"distill {args.steps}", False, _distill(args.steps))
        local: list[Trial] = []
        for rate in args.rates:
            for steps in args.local:
                for inputs in ("student", "original"):
                    settings = {"objective": "local", "steps": steps, "local_inputs": inputs, "learning_rate": rate}
                    for before, refit in (("", False), ("refit, ", True)):
                        local.append(self.run(f"{before}local {steps} ({inputs}, {rate:g})", refit, settings))
                        yield local[-1]
        best = min(local, key=lambda trial: float(trial["kl_to_original"]))
        for steps in args.shorter:
            for rate in args.shorter_rates:
                name, short = f"distill {steps} ({rate:g})", {**_distill(steps), "learning_rate": rate}
                yield self.run(f"{best['name']}, {name}", best["refit"], *best["stages"], short)
                yield self.run(f"refit, {name}", True, short)


def _distill(steps: int) -> dict[str, Any]:
    return {"objective": "distill", "steps": steps}


def main() -> None:
    args = arguments()
    trials: list[Trial] = []
    for trial in Trials(args).all():
        trials.append(trial)
        print(f"{trial['name']}: KL {trial['kl_to_original']:.4f}, {trial['seconds']:.0f} s", flush=True)
        subjects.write_json(args.json, vars(args), subjects.machine(), {"trials": trials})
    table = Table(title="the demo's model, condensed to four experts")
    for column in ("recovery", "KL to the original", "perplexity", "CPU seconds"):
        table.add_column(column, justify="left" if column == "recovery" else "right")
    for trial in trials:
        figures = f"{trial['kl_to_original']:.4f}", f"{trial['perplexity']:.2f}", f"{trial['seconds']:.0f}"
        table.add_row(trial["name"], *figures)
    subjects.console().print(table)


if __name__ == "__main__":
    main()
