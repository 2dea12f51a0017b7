"""The verb `search`: the steps of a method decide a plan. The searches of runs are cached and reused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from recondense import processes
from recondense.calibration.calibrate import Timed, describe_rounding, make_recorder, retape
from recondense.calibration.tape import TEXTS_PER_BATCH, Tape
from recondense.config.method_steps import method_identity
from recondense.config.schema import Config
from recondense.data.calibration_set import CalibrationSet
from recondense.errors import UserError
from recondense.files import JsonFolder, fingerprint, hold_lock
from recondense.methods.search.protection import SuperExperts
from recondense.methods.step import Record, SearchContext, Step
from recondense.models import decoder, families, model_classes
from recondense.models.layer_store import layer_store
from recondense.models.loading import weights_fingerprint
from recondense.operations import Operation
from recondense.plan import Plan
from recondense.run.inputs import keep_plan, load_plan
from recondense.run.refits import plan_refits
from recondense.run.search_memory import scratch_bytes
from recondense.run.sizes import outlined, require_one_width
from recondense.run.steps import as_steps
from recondense.run.super_experts import cached_super_experts, report_super_experts, super_experts_of
from recondense.surgery import execute
from recondense.surgery.apply import require_uncompressed
from recondense.surgery.student import Student

log = logging.getLogger(__name__)


Protected = Mapping[int, frozenset[int]]
Decided = tuple[Sequence[Operation], Record]


def search(
    tape: Tape, steps: Step | Sequence[Step] | str, *, refit: bool | str = False, protect_super_experts: bool = True
) -> Plan:
    """Decide how to compress each layer. The model is not changed; `apply` executes the plan.

    Args:
        tape: tape of the model, from `calibrate`.
        steps: a step of a method, such as `CDMoE(num_experts=4)`; a list of steps, each of which sees the model as the
            steps before it leave it; or the name of a method in conf/method, such as "moei2", with its default
            settings.
        refit: True adds a least-squares refit of the down projections of every changed layer; "coefficients" adds one
            of the experts' constant weights, in condensed layers only.
        protect_super_experts: lose no expert that makes massive activations, if the budgets allow it. False only warns.

    Returns:
        The operations in the order of their selection, and the scores that decided them.

    Raises:
        UserError: a step does not support the model, or cannot meet its budget; the message lists the problems of all
            steps. Also if the model has been compressed since it was loaded.

    Examples:
        >>> model, tokenizer = rc.load(folder)
        >>> tape = rc.calibrate(model, tokenizer, texts, num_samples=8, max_length=32)
        >>> plan = rc.search(tape, rc.CDMoE(num_experts=2, num_layers=1))
        >>> [operation.kind for operation in plan.operations]
        ['condense']
    """
    model = tape.model
    steps = as_steps(steps, model.config)
    require_uncompressed(model)
    facts = families.facts(model.config)
    if problems := [problem for step in steps for problem in step.check(facts)]:
        raise UserError("\n".join(problems))
    if len(steps) > 1:
        with outlined(model_classes.on_meta(model.config, model.dtype), steps):
            pass  # each step fits the shapes that the earlier ones leave
    scratch = scratch_bytes(Config(), decoder.device(model), model)
    super_experts = super_experts_of(lambda: tape, {})

    def search_one(step: Step, before: Sequence[Operation]) -> Decided:
        texts, split = tape.calibration_set, tape.texts.split
        protected = super_experts.protected(before) if protect_super_experts else {}
        record = cache(lambda: retape(tape) if before else tape)
        return step.search(SearchContext(model, record, {}, scratch, texts, split, protected))

    operations, records = _search_steps(model, steps, search_one, lambda: retape(tape))
    evidence = {**_evidence(records), **report_super_experts(super_experts, operations)}
    operations += plan_refits(operations, refit)
    return Plan(str(model.config.name_or_path), tuple(operations), search=evidence)


def find_plan(
    config: Config,
    steps: Sequence[Step],
    model: PreTrainedModel,
    calibration: CalibrationSet | None,
    inputs: Mapping[str, str],
    folder: Path,
    timed: Timed = lambda name: nullcontext(),
    file: str = "plan.json",
    student: Student | None = None,
) -> Plan:
    """Return the plan of a run or of one of its rounds from the run's folder, or search it with the cached results.

    Args:
        config: settings of the run.
        steps: steps of the method, in order.
        model: the model.
        calibration: the calibration set; not used without steps.
        inputs: fingerprints of the model's `weights` and of its `calibration` set.
        folder: the run's folder, to which the plan is written.
        timed: context manager that counts the seconds of a part of the run.
        file: the file of the plan in the folder.
        student: the model with its original, if earlier rounds have changed it.
    """
    path = folder / file
    name = str(config.model.path or config.model.name)
    if not steps:
        return Plan(model=name)
    decided_by = {name: inputs[name] for name in ("weights", "calibration")}
    layer_store(model).context = fingerprint(decided_by)
    plan = processes.broadcast(load_plan(path) if processes.is_first() else None)
    if plan is not None:
        keep_plan(folder, plan, file)
        log.info("plan: loaded from %s", path)
        return plan
    run = _RunSearch(config, model, calibration, decided_by, folder, timed, student)
    operations, evidence = run.search(steps)
    method = fingerprint([step.key() for step in steps], method_identity(config.method))
    plan = Plan(name, tuple(operations), {**run.decided_by, "method": method}, evidence)
    plan = processes.broadcast(plan)
    keep_plan(folder, plan, file)
    if processes.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        plan.save(path)
    return plan


class _RunSearch:
    """The search of a run, or of one of its rounds.

    Args:
        config, model, calibration, folder, timed, student: as in `find_plan`.
        original_by: fingerprints of the original's weights and of the calibration set.

    Attributes:
        decided_by: fingerprints of the current weights and of the calibration set.
        earlier: the operations of earlier rounds.
    """

    def __init__(
        self,
        config: Config,
        model: PreTrainedModel,
        calibration: CalibrationSet | None,
        original_by: Mapping[str, str],
        folder: Path,
        timed: Timed,
        student: Student | None,
    ) -> None:
        self.config, self.model, self.calibration, self.student = config, model, calibration, student
        self.original_by = dict(original_by)
        self.decided_by = self.original_by
        self.earlier: tuple[Operation, ...] = ()
        if student is not None:
            self.decided_by = {**original_by, "weights": processes.broadcast(weights_fingerprint(model))}
            self.earlier = student.plan.operations
        self.split, self.unsplit = (make_recorder(config, model, calibration, folder, timed, s) for s in (True, False))
        self.first = cache(self.split)  # for the super experts and for the first step

    def search(self, steps: Sequence[Step]) -> Decided:
        """Search the operations of some steps, and their evidence."""
        super_experts = self._super_experts()
        protects = self.config.method.get("protect_super_experts", True)

        def search_one(step: Step, before: Sequence[Operation]) -> Decided:
            protected = super_experts.protected([*self.earlier, *before]) if protects else {}
            original = super_experts.protected([]) if protects else {}
            decided = self._search_step(step, before, protected, original)
            self.first.cache_clear()
            return decided

        operations, records = _search_steps(self.model, steps, search_one, self.unsplit)
        report = report_super_experts(super_experts, [*self.earlier, *operations])
        return operations + plan_refits(operations, self.config.method.get("refit", False)), {
            **_evidence(records),
            **report,
        }

    def _super_experts(self) -> SuperExperts:
        """Find the super experts of the original, or read them from the cache, where later rounds find them."""
        folder, rounding = Path(self.config.cache_dir) / "search", describe_rounding(self.config, self.model)
        if self.student is None:
            return cached_super_experts(folder, self.original_by, rounding, self.first)
        with self.student.original():
            return cached_super_experts(folder, self.original_by, rounding, self.split)

    def _search_step(
        self, step: Step, before: Sequence[Operation], protected: Protected, of_original: Protected
    ) -> Decided:
        """Search one step, see `search_step`; layers that no earlier round has changed have the original's cache."""
        changed = {operation.layer for operation in before}
        record = self.split if before else self.first
        arguments = self.config, step, self.model, record
        if self.student is None:
            return search_step(*arguments, self.decided_by, before, self.calibration, protected)
        key = search_key(self.config, step, self.model, self.original_by, (), of_original)
        inherited = Path(self.config.cache_dir) / "search" / key
        unchanged = min(changed | self.student.changed_layers(), default=0)
        earlier = [*self.earlier, *before]
        return search_step(
            *arguments, self.decided_by, earlier, self.calibration, protected, inherited=inherited, unchanged=unchanged
        )


def _search_steps(
    model: PreTrainedModel,
    steps: Sequence[Step],
    search_one: Callable[[Step, Sequence[Operation]], Decided],
    record: Callable[[], Tape],
) -> tuple[list[Operation], list[Record]]:
    """Search the steps in order; each sees the model after the earlier ones. Afterwards the model is restored.

    Args:
        model: the model.
        steps: steps of the method.
        search_one: searches one step, given the operations of the earlier steps.
        record: records a tape of the model in its current state.

    Returns:
        The operations of all steps, and for each step the scores that decided them.
    """
    operations: list[Operation] = []
    records: list[Record] = []
    originals: list[dict[int, nn.Module]] = []
    try:
        for index, step in enumerate(steps):
            require_one_width(model, step)
            new, decided_by = search_one(step, operations)
            operations += new
            records.append(decided_by)
            if index < len(steps) - 1:
                originals.append(execute.execute(model, Plan("", tuple(new)), record))
    finally:
        execute.restore(model, originals)
    return operations, records


def search_step(
    config: Config,
    step: Step,
    model: PreTrainedModel,
    record: Callable[[], Tape],
    decided_by: Mapping[str, str],
    before: Sequence[Operation],
    calibration: CalibrationSet | None,
    protected: Protected,
    inherited: Path | None = None,
    unchanged: int = 0,
) -> Decided:
    """Search one step of a run with the cached results of other runs, which may use the cache at the same time.

    Args:
        config: settings of the run.
        step: the step.
        model: the model after the earlier steps.
        record: records a tape of the model in its current state.
        decided_by: fingerprints of the model's weights and of the calibration set.
        before: operations of the earlier steps.
        calibration: the calibration set.
        protected: the super experts of each layer.
        inherited: folder of the cached search of the original; None in the first round.
        unchanged: the number of layers, from the lowest, that are as in that search.
    """
    folder = Path(config.cache_dir) / "search" / search_key(config, step, model, decided_by, before, protected)
    # The original's records are used without its lock, so that runs whose trained models differ do not wait for one
    # another. Each record is written at once, and whoever makes it makes the same one.
    of_original = processes.SharedMapping(JsonFolder(inherited)) if inherited is not None and unchanged else None
    lock = hold_lock(folder / ".lock", "runs the same search") if processes.is_first() else nullcontext()
    with lock:
        known = processes.SharedMapping(JsonFolder(folder))
        scratch = scratch_bytes(config, decoder.device(model), model)
        context = SearchContext(
            *(model, cache(record), known, scratch, calibration, True, protected),
            unchanged=unchanged,
            inherited=of_original,
        )
        operations, evidence = step.search(context)
    if reused := evidence.get("reused", ""):
        log.info("search: reused %s from %s", reused, folder)
    if seconds := evidence.get("seconds", {}):
        log.info("search: %s", ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items()))
    return list(operations), evidence


def search_key(
    config: Config,
    step: Step,
    model: PreTrainedModel,
    decided_by: Mapping[str, str],
    before: Sequence[Operation],
    protected: Protected,
) -> str:
    """Return the name of the folder of a cached search; the arguments are those of `search_step`."""
    earlier = Plan(model="", operations=tuple(before)).to_dict()["operations"]
    depends_on = [*describe_rounding(config, model)]
    if protected:
        depends_on.append(f"protected: {sorted((layer, *sorted(experts)) for layer, experts in protected.items())}")
    return fingerprint(dict(decided_by), TEXTS_PER_BATCH, step.key(), earlier, *depends_on)


def _evidence(records: Sequence[Record]) -> Record:
    """Return the search's entry in plan.json, without seconds and reuse, which do not determine the plan."""
    steps = [{name: value for name, value in r.items() if name not in ("reused", "seconds")} for r in records]
    return steps[0] if len(steps) == 1 else {"steps": steps}
