"""Plans as a command would search them, for every method of conf/method.

As a script this is one process of two: `python searched.py FOLDER RANK`. The first writes FOLDER/<method>.json, and
FOLDER/<method>-<kind>.json for the others of SEARCHES.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import recondense.run.default_budget  # noqa: F401 (registers ${budget:...})
from recondense import processes
from recondense.calibration import tape as tape_module
from recondense.calibration.super_experts import find_super_experts
from recondense.calibration.tape import TRACE_BYTES
from recondense.config.schema import read
from recondense.data.calibration_set import CalibrationSet
from recondense.files import JsonFolder
from recondense.methods.step import SearchContext
from recondense.models import families, moe_blocks
from recondense.models.tensor_store import Disk, Storage
from recondense.plan import Plan
from recondense.run.build_steps import build_steps
from recondense.surgery import execute
from support.read_once import read_configs_once
from support.super_expert import with_super_expert
from support.tiny_models import FAMILIES, recorded, texts

CONF = Path(__file__).resolve().parents[2] / "conf"
METHODS = sorted(path.stem for path in (CONF / "method").glob("[!_]*.yaml"))
# The small budget of a method, as a user would write it, if it is not removed_expert_ratio=0.4.
SMALL: dict[str, list[str]] = {
    "cdmoe": ["method.num_experts=2", "method.num_layers=1"],
    "cdmoe_s": ["method.num_layers=[2]"],
    "none": [],
    "block_drop": ["method.memory_ratio=0.8"],
    "svd_llm": ["method.memory_ratio=0.8"],
    "narrow": ["method.removed_expert_ratio=0.4", "method.width_multiple=4"],
    "cdmoe_moei2": [
        *("method.memory_ratio=0.85", "method.num_experts=[2]", "method.prune_ratios=[0.34]"),
        *("method.kept_ratios=[0.5]", "method.width_ratios=[0.5]", "method.population=20", "method.parents=5"),
    ],
    "moei2": ["method.prune_ratio=0.34", "method.memory_ratio=0.7", "method.population=10", "method.parents=4"],
}
BUDGETS = {method: SMALL.get(method, ["method.removed_expert_ratio=0.4"]) for method in METHODS}

FIRST = next(iter(FAMILIES))
TAPES = ("on-disk", "without-traces")  # other than a tape in memory with the traces of all sparse layers
WITH_OTHER_TAPES = ("cdmoe", "moei2")
PROPAGATED = "propagated"  # scored behind the layers pruned so far
# What several processes search: a method, and what differs from its small budget.
SEARCHES = [*((method, "") for method in METHODS), *product(WITH_OTHER_TAPES, TAPES), ("reap", PROPAGATED)]


def overrides_of(method: str, kind: str = "") -> list[str]:
    """The settings of one of SEARCHES."""
    return [*BUDGETS[method], *(["method.propagate=true"] if kind == PROPAGATED else [])]


def steps_of(method: str, *overrides: str) -> tuple[list[Any], dict[str, Any]]:
    """The steps that a command would run, and the settings of the method."""
    settings = copy.deepcopy(_settings(method, *overrides))
    return build_steps(settings), settings


@functools.cache
def _settings(method: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        values = OmegaConf.to_container(compose("train", [f"method={method}", *overrides]), resolve=True)
    config, problems = read(cast(dict[str, Any], values))
    assert problems == []
    return dict(config.method)


def whole_texts() -> CalibrationSet:
    """The texts of `recorded`, as the beginnings of longer ones."""
    ids = texts()
    ends = texts(1, [5, 30, 0, 12, 1])
    return CalibrationSet(ids, [[*ids[index], *ends[index % len(ends)]] for index in range(len(ids))])


def plan_of(model: Any, method: str, folder: Path, *overrides: str, storage: Storage | None = None) -> Plan:
    """Search step by step, each on the model as the previous step leaves it; the model is unchanged afterwards."""
    record_tape = partial(recorded, model, storage=storage)
    steps, _ = steps_of(method, *overrides)
    facts = families.facts(model.config)
    assert [problem for step in steps for problem in step.check(facts)] == []
    operations: list[Any] = []
    records: list[dict[str, Any]] = []
    originals: dict[int, Any] = {}
    for index, step in enumerate(steps):
        cache = processes.SharedMapping(JsonFolder(folder / str(index)))
        tape = partial(record_tape, split=True)
        step_operations, record = step.search(SearchContext(model, tape, cache, 1 << 30, whole_texts(), split=True))
        operations += step_operations
        records.append({name: value for name, value in record.items() if name not in ("seconds", "reused")})
        if step is not steps[-1]:
            originals = {**execute.execute(model, Plan("tiny", tuple(step_operations)), record_tape), **originals}
    for layer, block in originals.items():
        moe_blocks.set_block(model, layer, block)
    return Plan("tiny", tuple(operations), search={"steps": records})


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    read_configs_once()
    torch.distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    planted, _ = with_super_expert(FIRST)
    outputs = find_super_experts(recorded(planted, split=True))
    if rank == 0:
        (folder / "super_experts.json").write_text(
            json.dumps([[layer, *experts] for layer, experts in outputs.items()])
        )
    for method, tape in SEARCHES:
        name = f"{method}-{tape}" if tape else method
        model = next(iter(FAMILIES.values()))()
        tape_module.TRACE_BYTES = 0 if tape == "without-traces" else TRACE_BYTES
        storage = Disk(folder / "tapes", keeps=False) if tape == "on-disk" else None
        plan = plan_of(model, method, folder / str(rank) / name, *overrides_of(method, tape), storage=storage)
        if rank == 0:
            plan.save(folder / f"{name}.json")
        else:
            assert not (folder / str(rank)).exists(), "only the first process writes"
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
