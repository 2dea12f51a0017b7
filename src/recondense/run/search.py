"""SEARCH: the steps of a method decide a plan. A run's search is made once, cached, and reused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense import processes
from recondense.calibration.record import Timed, describe_rounding, make_recorder, retape
from recondense.calibration.tape import TEXTS_PER_BATCH, Tape
from recondense.config.schema import Config
from recondense.data.texts import Texts
from recondense.errors import UserError
from recondense.files import JsonFolder, fingerprint, hold_lock
from recondense.methods.step import Record, SearchContext, Step
from recondense.models import decoder, families, views
from recondense.models.layer_store import layer_store
from recondense.operations import Operation
from recondense.plan import Plan
from recondense.run.refits import plan_refits
from recondense.run.search_memory import scratch_bytes
from recondense.run.steps import as_steps
from recondense.surgery import apply
from recondense.surgery.student import require_uncompressed

log = logging.getLogger(__name__)


Decided = tuple[Sequence[Operation], Record]


def search(tape: Tape, steps: Step | Sequence[Step] | str, *, refit: bool | str = False) -> Plan:
    """Decide what to compress. The model is left bit-identical; `apply` executes the plan.

    Args:
        tape: of the model, from `calibrate`.
        steps: a step of a method; several, each of which sees the model as the steps before leave it; or the name of a
            method in conf/method, such as "moei2", with its default settings.
        refit: end with a least-squares refit of every changed layer: False; True (down_proj); or "coefficients" (of
            condensed layers only).

    Returns:
        The operations in the order in which they were chosen, and the scores that decided them.

    Raises:
        UserError: a step does not suit the model, or its budget cannot be kept; all problems in one message. The model
            was compressed after it was taped.

    Example:
        >>> model, tokenizer = rc.load(folder)
        >>> tape = rc.calibrate(model, tokenizer, texts, num_samples=8, max_length=32)
        >>> plan = rc.search(tape, rc.CDMoE(num_experts=2, num_layers=1))
        >>> [operation.kind for operation in plan.operations]
        ['condense']
    """
    steps = as_steps(steps)
    model = tape.model
    require_uncompressed(model)
    facts = families.facts(model.config)
    if problems := [problem for step in steps for problem in step.check(facts)]:
        raise UserError("\n".join(problems))
    scratch = scratch_bytes(Config(), decoder.device(model), model)

    def search_one(step: Step, before: Sequence[Operation]) -> Decided:
        context = SearchContext(model, cache(lambda: retape(tape) if before else tape), {}, scratch)
        return step.search(context)

    operations, records = _search_steps(model, steps, search_one, lambda: retape(tape))
    operations += plan_refits(operations, refit)
    return Plan(str(model.config.name_or_path), tuple(operations), search=_evidence(records))


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
    """Return the run's plan: from its folder, or searched with all that the cache knows.

    Args:
        steps: of the method, in order.
        inputs: fingerprints of the model's `weights` and of its `calibration` set.
        folder: of the run; plan.json is written there.
        timed: counts the time of a part of the run.
    """
    path = folder / "plan.json"
    name = str(config.model.path or config.model.name)
    if not steps:
        return Plan(model=name)
    decided_by = {name: inputs[name] for name in ("weights", "calibration")}
    layer_store(model).context = fingerprint(decided_by)
    plan = processes.broadcast(Plan.load(path) if processes.is_first() and path.exists() else None)
    if plan is not None:
        log.info("plan: found in %s", path)
        return plan
    record_split = make_recorder(config, model, tokenizer, texts, folder, timed, split=True)
    record_unsplit = make_recorder(config, model, tokenizer, texts, folder, timed)

    def search_one(step: Step, before: Sequence[Operation]) -> Decided:
        return search_step(config, step, model, record_split, decided_by, before)

    operations, records = _search_steps(model, steps, search_one, record_unsplit)
    operations += plan_refits(operations, config.method.get("refit", False))
    method = fingerprint([step.key() for step in steps], dict(config.method))
    plan = Plan(name, tuple(operations), {**decided_by, "method": method}, _evidence(records))
    plan = processes.broadcast(plan)
    if processes.is_first():
        plan.save(path)
    return plan


def _search_steps(
    model: PreTrainedModel,
    steps: Sequence[Step],
    search_one: Callable[[Step, Sequence[Operation]], Decided],
    record: Callable[[], Tape],
) -> tuple[list[Operation], list[Record]]:
    """Search step by step; each sees the model as the ones before left it. The model is left as it was.

    Args:
        search_one: searches a step, given the operations before it.
        record: tapes the model as it is when called.

    Returns:
        The operations of all steps, and what decided each step.
    """
    operations: list[Operation] = []
    records: list[Record] = []
    originals: dict[int, nn.Module] = {}
    try:
        for index, step in enumerate(steps):
            chosen, decided_by = search_one(step, operations)
            operations += chosen
            records.append(decided_by)
            if index < len(steps) - 1:
                originals = {**apply.execute(model, Plan("", tuple(chosen)), record), **originals}
    finally:
        for layer, block in originals.items():
            views.set_block(model, layer, block)
    return operations, records


def search_step(
    config: Config,
    step: Step,
    model: PreTrainedModel,
    record: Callable[[], Tape],
    decided_by: Mapping[str, str],
    before: Sequence[Operation],
) -> Decided:
    """Search one step of a run, with all that the cache knows; other runs may use the cache at the same time.

    Args:
        record: tapes the model as it is when called.
        decided_by: fingerprints of the model's weights and of the calibration set.
        before: operations of the steps before.
    """
    earlier = Plan(model="", operations=tuple(before)).to_dict()["operations"]
    key = fingerprint(dict(decided_by), TEXTS_PER_BATCH, step.key(), earlier, *describe_rounding(config, model))
    folder = Path(config.cache_dir) / "search" / key
    folder.mkdir(parents=True, exist_ok=True)
    lock = hold_lock(folder / ".lock", "searches the same") if processes.is_first() else nullcontext()
    with lock:
        scratch = scratch_bytes(config, decoder.device(model), model)
        known = processes.SharedMapping(JsonFolder(folder))
        operations, evidence = step.search(SearchContext(model, cache(record), known, scratch))
    if reused := evidence.get("reused", ""):
        log.info("search: reused %s from %s", reused, folder)
    if seconds := evidence.get("seconds", {}):
        log.info("search: %s", ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items()))
    return list(operations), evidence


def _evidence(records: Sequence[Record]) -> Record:
    """Return what plan.json says of the search; not how long it took and what the cache had, for the plan is the same."""
    kept = [{name: value for name, value in r.items() if name not in ("reused", "seconds")} for r in records]
    return kept[0] if len(kept) == 1 else {"steps": kept}
