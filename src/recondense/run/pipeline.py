"""The stages of a run: load, measure, search, apply, refit, recover, measure, export.

Each stage is one verb of the public API. The run adds logging, timing, and the reuse of results in its folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from transformers import PreTrainedModel

from recondense import processes
from recondense.calibration.calibrate import make_recorder
from recondense.calibration.tape import Tape
from recondense.config.schema import Config
from recondense.config.stages import Stage, Stages, require_stages, without_teacher
from recondense.evaluation import profiling
from recondense.export.export import export
from recondense.export.stock_or_bundled import choose_layout
from recondense.full_disk import explain_full_disks, warn_of_little_room
from recondense.methods.step import Step
from recondense.models import decoder, families, loading, parameters, quantized
from recondense.models.layer_shapes import layer_shapes
from recondense.models.layer_store import layer_store
from recondense.models.model_files import history_of
from recondense.plan import Plan
from recondense.progress import progress
from recondense.report import model_card, tables, tracking, wandb_run
from recondense.report.figures import try_to_draw
from recondense.report.plan_picture import draw_plan
from recondense.report.summary import Summary, metric
from recondense.run import launching, run_folder
from recondense.run.inputs import compare_files, inputs_of, keep_export, keep_files, keep_inputs
from recondense.run.load import MakeCallbacks, load_model, locate, no_callbacks
from recondense.run.measure import Evaluator, ResultStages
from recondense.run.prepare import Prepared, prepare
from recondense.run.process_settings import configure_process
from recondense.run.recover import (
    DESCRIBED_IF_CHANGED,
    Recovery,
    local_training_bytes,
    log_footprint,
    prepare_student,
)
from recondense.run.resolved_run import Run
from recondense.run.run_record import RunRecord
from recondense.run.search import find_plan
from recondense.run.streamed_memory import StreamedMemory
from recondense.run.upload import missing_upload, read_summary, upload, write_summary
from recondense.surgery.apply import apply
from recondense.surgery.student import Student

log = logging.getLogger(__name__)


def run(
    config: Config,
    steps: Sequence[Step],
    callbacks: MakeCallbacks = no_callbacks,
    command: Sequence[str] | None = None,
    stages: Stages | None = None,
) -> Any:
    """Run a config, or resume it: the same config uses the same folder again.

    If the run has several processes, only the first one writes, prints and evaluates.

    Args:
        config: settings of the run, without `plan_only`.
        steps: steps of the method, in order.
        callbacks: returns the callbacks of each Lightning Trainer.
        command: command that starts a further process of this run; None for the command that started this one.
        stages: stages of the recovery, if they are already resolved.

    Returns:
        the metric that a sweep compares, as a tuple if there are several; None if this run does not measure it.

    Raises:
        ConfigError: another process is working in the folder.
        UserError, OSError: an error that the user can fix; the message says how.
    """
    complete = Run(config, require_stages(config) if stages is None else stages, steps)
    folder = config.run_folder()
    gpu = loading.choose_device(config.model).type == "cuda"
    with launching.start_processes(config.trainer, gpu, command):
        configure_process(config.trainer)
        places = {"run_dir": folder, "cache_dir": Path(config.cache_dir)}
        with explain_full_disks(places), run_folder.lock_folder(folder, resumes=not config.overwrite):
            return _finish(complete, callbacks, folder)


def _finish(run: Run, callbacks: MakeCallbacks, folder: Path) -> Any:
    """Run the unfinished stages, print the results and upload them. Return the same as `run`."""
    config = run.config
    finished = processes.broadcast(run_folder.has_summary(config))
    gone = compare_files(run, folder).gone
    if not finished:
        _start(run, callbacks, folder)
    if not processes.is_first():
        return None
    summary = read_summary(folder)
    run_folder.clear_work(folder)
    repository = missing_upload(config.export, summary)
    if finished:
        state = "all done except for the upload" if repository else "all done"
        print(f"{state}: this run is in {folder}; use overwrite=true to start over")
        print("".join(f"{name} is no longer there, so it was not compared\n" for name in gone), end="")
    tables.print_report(summary)
    print(f"\nresults: {folder}")
    if repository:
        upload(repository, folder, summary, private=config.export.private)
    return metric(summary, config.metric)


def _start(run: Run, callbacks: MakeCallbacks, folder: Path) -> None:
    """Read all inputs, run the stages, and write summary.json. The folder is not changed before all inputs are read."""
    config = run.config
    prepared = prepare(run, callbacks)
    at_start = profiling.peak_resident_bytes()
    model = load_model(config, prepared.path)
    inputs = inputs_of(config, model, prepared.tokenizer, prepared.tokens)
    if processes.is_first():
        run_folder.begin(config, folder)
    keep_inputs(folder, inputs)
    keep_files(run, folder)
    memory = StreamedMemory(config, model, at_start) if layer_store(model).streamed else None
    loggers: list[Logger] = []
    if processes.is_first():
        loggers = tracking.make_loggers(config.logger, folder, config.resolved(), wandb_run.names_of(config))
    try:
        summary = _Stages(run, callbacks, folder, model, prepared, inputs, loggers, memory).finish()
        if summary is not None:
            tracking.log_summary(loggers, summary)
            write_summary(folder, summary)
    finally:
        tracking.finish_loggers(loggers)


class _Stages:
    """The stages of one run with a loaded model. Each stores its result in the run's folder and reuses it there.

    Args:
        run: the resolved run.
        callbacks: returns the callbacks of each Lightning Trainer.
        folder: the run's folder.
        model: the model.
        prepared: its tokenizer, token ids and tasks.
        inputs: fingerprints of the run's inputs, by name.
        loggers: loggers of the figures.
        memory: peak memory of a streamed model; None for other models.
    """

    def __init__(
        self,
        run: Run,
        callbacks: MakeCallbacks,
        folder: Path,
        model: PreTrainedModel,
        prepared: Prepared,
        inputs: Mapping[str, str],
        loggers: Sequence[Logger],
        memory: StreamedMemory | None,
    ) -> None:
        self.config = config = run.config
        self.stages = run.stages
        self.steps = run.steps
        self.callbacks = callbacks
        self.folder = folder
        self.model = model
        self.tokenizer = tokenizer = prepared.tokenizer
        self.tokens = tokens = prepared.tokens
        self.loggers = loggers
        self.memory = memory
        self.record = RunRecord(folder, inputs)
        self.evaluator = Evaluator.of_run(
            config, tokenizer, tokens.validation, prepared.tasks, inputs, self.record.timed
        )
        self.results = ResultStages(config, model, self.evaluator, self.record)

    def finish(self) -> dict[str, Any] | None:
        """Run all stages.

        Returns:
            the content of summary.json; None in all processes except the first.
        """
        self.results.measure_original()
        sizes = {"original": parameters.sizes(self.model)}
        plan = self.search()
        stages = list(self.stages)
        if not plan.operations:
            stages = [replace(stage, recovery=without_teacher(stage.recovery)) for stage in stages]
        student = self.apply(plan, stages)
        sizes["compressed"] = parameters.sizes(self.model)
        if plan.operations:
            self.results.measure("compressed", student, untrained=True)
        else:
            self.results.profile_original()
        self.refit(student)
        recovery_stages = self.recover(student, stages)
        return processes.run_on_first(lambda: self.collect(student, sizes, recovery_stages))

    def search(self) -> Plan:
        """Search the plan, or load it; draw it and log it."""
        with self.record.timed("search"):
            plan = find_plan(
                self.config,
                self.steps,
                self.model,
                self.tokens.calibration,
                self.record.inputs,
                self.folder,
                self.record.timed,
            )
        if plan.operations and processes.is_first():
            facts = families.facts(self.model.config)
            data, path = plan.to_dict(), self.folder / "plan.png"
            picture = try_to_draw(lambda: draw_plan(data, facts.num_experts, facts.moe_layers, path), path)
            tracking.log_plan(self.loggers, data, picture)
        return plan

    def apply(self, plan: Plan, stages: Sequence[Stage]) -> Student:
        """Apply the plan without its refits, and give the student its own copies of the weights that will be trained.

        Raises:
            UserError: the compressed model cannot be exported in the requested format. This is checked before training.
        """
        config, model = self.config, self.model
        if stages != list(self.stages):
            log.info("the model is not compressed, so next-token training replaces the distillation")
        with self.record.timed("apply"):
            student = apply(model, plan, self._tape, refit=False)
            prepare_student(student, stages, self._trained_layers(plan))
        if config.export.format == "stock" and config.export.enabled is not False:
            choose_layout(model, layer_shapes(model), config.export)
        if config.export.enabled is not False and processes.is_first():
            warn_of_little_room(self.folder, parameters.weights_bytes(model), "the exported model")
        return student

    def refit(self, student: Student) -> None:
        """Execute the plan's refits, if there are any, and measure the model."""
        if any(operation.kind == "refit" for operation in student.plan.operations):
            with self.record.timed("refit"):
                self.record.keep_refit(student.refit(self._tape))
            self.results.measure("refitted", student, untrained=True)

    def recover(self, student: Student, stages: Sequence[Stage]) -> list[dict[str, Any]]:
        """Train the student and, if requested, the control; measure both.

        Returns:
            a description of each recovery stage for summary.json; empty without a recovery.
        """
        config, model, plan = self.config, self.model, student.plan
        if config.recovery.objective == "none":
            return []
        log_footprint(student)
        device, layers = decoder.device(model), self._trained_layers(plan)
        recovery = Recovery(
            *(config, stages, layers, self.folder, self.tokens.stages),
            *(self.tokenizer, device, self.record, self._callbacks),
            self.loggers,
        )
        if self.memory is not None and (size := local_training_bytes(student, stages, layers)):
            self.memory.count_training(size)
        cached = recovery.keep_predictions(student)
        descriptions = recovery.recover(student, cached, lambda: self._load_whole(student))
        self.results.measure("recovered", student, original=self._load_original if self.memory is not None else None)
        if config.recovery.control and plan.operations and not self.record.has("control"):
            with recovery.train_control(student):
                self.results.measure("control", Student(model, Plan(model=plan.model)), profiled=False)
        return descriptions

    def _load_whole(self, student: Student) -> None:
        """Load a streamed model into memory, after reading the peak memory of the streamed part."""
        if self.memory is not None and layer_store(self.model).streamed:
            self.memory.take_peak()
            student.load_into_memory()

    def _tape(self) -> Tape:
        """Record a tape of the model in its current state on the calibration set."""
        return make_recorder(self.config, self.model, self.tokens.calibration, self.folder, self.record.timed)()

    def _trained_layers(self, plan: Plan) -> Sequence[int] | None:
        """Return the layers whose experts are trained; None for those of the plan. An empty plan uses earlier plans."""
        if plan.operations:
            return None
        return history_of(self.model).changed_layers(len(decoder.decoder_layers(self.model)))

    def _callbacks(self, stage: str, *, with_tasks: bool) -> Sequence[Callback]:
        """Return the callbacks of a fit. Tasks are evaluated during the student's fits, but not the control's."""
        tasks, include_path = (self.evaluator.tasks, self.evaluator.include_path) if with_tasks else ((), ())
        return self.callbacks(stage, tasks, include_path, self.record.timed)

    @contextmanager
    def _load_original(self) -> Iterator[Any]:
        """Yield the original, loaded from its checkpoint, because the compressed model has replaced it."""
        with processes.work_alone():  # only the first process evaluates
            original = load_model(self.config, locate(self.config, self.callbacks))
        yield original

    def collect(
        self, student: Student, sizes: Mapping[str, Mapping[str, int]], recovery_stages: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Export the student, and return the content of summary.json.

        Args:
            student: the student after all stages.
            sizes: parameters of the original and of the compressed model.
            recovery_stages: description of each recovery stage.
        """
        config, model, record, plan = self.config, self.model, self.record, student.plan
        objective = (config.recovery if plan.operations else without_teacher(config.recovery)).objective
        summary = Summary.of_run(config, objective, plan, sizes, model, self.tokens.sha256, record.stages)
        summary.refit = record.refit_errors or None
        described = config.recovery.stages or config.recovery.trainable != "experts"
        described = described or any({"layers", *DESCRIBED_IF_CHANGED} & stage.keys() for stage in recovery_stages)
        if described or any(windows.counts for windows in self.tokens.stages.values()):
            summary.recovery_stages = recovery_stages or None
        stored = quantized.stored_weights(config.model.path, config.model.revision) if config.model.path else None
        if stored and plan.operations:
            summary.count_bytes_on_disk(stored, parameters.weights_bytes(model))
        changed = bool(plan.operations) or config.recovery.objective != "none"
        if config.export.enabled is True or (config.export.enabled == "auto" and changed):
            self._export(student, summary, stored)
        if self.memory is not None:
            if layer_store(model).streamed:  # no recovery has loaded it into memory
                self.memory.take_peak()
            summary.memory = self.memory.to_dict()
        summary.seconds = record.seconds
        return summary.to_dict()

    def _export(self, student: Student, summary: Summary, stored: quantized.StoredWeights | None) -> None:
        folder = self.folder / "model"

        def card(exported: Path) -> str:
            if stored and student.plan.operations:
                summary.count_bytes_on_disk(stored, quantized.bytes_on_disk(exported) or 0)
            return model_card.model_card(summary.to_dict())

        with self.record.timed("export"), progress("exporting"):
            kind = export(student, self.tokenizer, folder, self.config.export, card=card)
        keep_export(self.folder)
        log.info("exported: %s (%s)", folder, kind)
        summary.artifacts |= {"model": "model", "export_format": kind}
        tracking.log_export(self.loggers, folder)
