"""The search of a run: made once, cached, and reused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense import processes
from recondense.calibration.record import Timed, recorder, rounded
from recondense.calibration.tape import TEXTS_PER_BLOCK, Tape
from recondense.config.schema import Config
from recondense.data.texts import Texts
from recondense.files import JsonFolder, fingerprint, waiting_lock
from recondense.methods.step import SearchContext, Step
from recondense.models import decoder, views
from recondense.models.layer_store import layer_store
from recondense.models.parameters import largest_layer_bytes
from recondense.operations import Operation
from recondense.plan import Plan
from recondense.run.refits import plan_refits
from recondense.surgery import apply

log = logging.getLogger(__name__)


def find_plan(
    config: Config,
    steps: Sequence[Step],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    inputs: Mapping[str, str],
    folder: Path,
    timed: Timed = lambda name: nullcontext(),
) -> Plan:
    """The run's plan: from its folder, or searched step by step with all that the cache knows.

    Each step sees the model as the previous ones left it; the model is left as it was.

    Args:
        inputs: fingerprints of the model's `weights` and of its `calibration` set.
        folder: of the run; plan.json is written there.
        timed: counts the time of a stage.
    """
    path = folder / "plan.json"
    name = str(config.model.path or config.model.name)
    if not steps:
        return Plan(model=name)
    found = {name: inputs[name] for name in ("weights", "calibration")}
    layer_store(model).context = fingerprint(found)
    record_split = recorder(config, model, tokenizer, texts, folder, timed, split=True)
    record_whole = recorder(config, model, tokenizer, texts, folder, timed)
    plan = processes.broadcast(Plan.load(path) if processes.is_first() and path.exists() else None)
    if plan is not None:
        log.info("plan: found in %s", path)
        return plan
    operations: list[Operation] = []
    records: list[dict[str, Any]] = []
    originals: dict[int, nn.Module] = {}
    try:
        for step in steps:
            chosen, record = search_step(config, step, model, record_split, found, operations)
            operations += chosen
            records.append(record)
            if step is not steps[-1]:
                taken = apply.apply(model, Plan(model=name, operations=tuple(chosen)), record_whole)
                originals = {**taken, **originals}
    finally:
        for layer, block in originals.items():
            views.set_block(model, layer, block)
    operations += plan_refits(operations, config.method.get("refit", False))
    method = fingerprint([step.key() for step in steps], dict(config.method))
    search = records[0] if len(records) == 1 else {"steps": records}
    plan = processes.broadcast(Plan(name, tuple(operations), {**found, "method": method}, search))
    if processes.is_first():
        plan.save(path)
    return plan


def search_step(
    config: Config,
    step: Step,
    model: PreTrainedModel,
    record: Callable[[], Tape],
    found: Mapping[str, str],
    before: Sequence[Operation],
) -> tuple[Sequence[Operation], dict[str, Any]]:
    """Search one step with the cached orders that weights, calibration and the step's settings name."""
    earlier = Plan(model="", operations=tuple(before)).to_dict()["operations"]
    key = fingerprint(dict(found), TEXTS_PER_BLOCK, step.key(), earlier, *rounded(config, model))
    folder = Path(config.cache_dir) / "search" / key
    folder.mkdir(parents=True, exist_ok=True)

    tape = cache(record)
    alone = waiting_lock(folder / ".lock", "searches the same") if processes.is_first() else nullcontext()
    with alone:
        scratch = scratch_bytes(config, decoder.device(model), model)
        chosen, found_by = step.search(SearchContext(model, tape, processes.FirstProcess(JsonFolder(folder)), scratch))
    # Not part of the plan, which is the same whatever the cache had, and however long it took.
    if reused := found_by.pop("reused", ""):
        log.info("search: reused %s from %s", reused, folder)
    if seconds := found_by.pop("seconds", {}):
        log.info("search: %s", ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items()))
    return chosen, found_by


def scratch_bytes(config: Config, device: torch.device, model: PreTrainedModel | None = None) -> int:
    """The bound on temporary tensors: as configured, or a quarter of the memory that is free now, for all processes.

    For a model larger than memory, as much as its largest decoder layer.
    """
    if config.max_scratch_bytes != "auto":
        return config.max_scratch_bytes
    if model is not None and layer_store(model).streamed:
        return max(largest_layer_bytes(model), 1 << 26)
    on_cpu = psutil.virtual_memory().available // processes.world_size()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else on_cpu
    return processes.broadcast(max(free // 4, 1 << 26))
