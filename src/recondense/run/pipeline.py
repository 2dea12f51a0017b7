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
from recondense.data.tokens import StageTokens
from recondense.evaluation import profiling
from recondense.export.stock_or_bundled import choose_layout
from recondense.full_disk import explain_full_disks, warn_of_little_room
from recondense.methods.step import Step
from recondense.models import decoder, loading, parameters, quantized
from recondense.models.layer_shapes import layer_shapes
from recondense.models.layer_store import layer_store
from recondense.models.model_files import history_of
from recondense.plan import Plan
from recondense.report import tables, tracking, wandb_run
from recondense.report.summary import metric
from recondense.run import launching, run_folder
from recondense.run.collect import draw_and_log, export_student, summary_of
from recondense.run.inputs import compare_files, inputs_of, keep_files, keep_inputs, keep_plan_of_rounds
from recondense.run.load import MakeCallbacks, load_model, locate, no_callbacks
from recondense.run.measure import Evaluator, ResultStages
from recondense.run.prepare import Prepared, prepare
from recondense.run.process_settings import configure_process
from recondense.run.recover import Recovery, local_training_bytes, log_footprint, prepare_student
from recondense.run.resolved_run import Run
from recondense.run.round_recovery import config_of, plan_of, stages_of
from recondense.run.rounds import Round, make_rounds
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
        self.plans: list[Plan] = []  # of the rounds so far
        self.device = decoder.device(model)  # after a training in parts, the first process alone has the weights

    def finish(self) -> dict[str, Any] | None:
        """Run all stages. Return the content of summary.json; None in all processes except the first."""
        self.results.measure_original()
        sizes = {"original": parameters.sizes(self.model)}
        student: Student | None = None
        descriptions: list[dict[str, Any]] = []
        for one in make_rounds(self.config.method, self.steps, self.model):
            student = self.compress(one, student)
            if one.is_last:
                sizes["compressed"] = parameters.sizes(self.model)
                self.measure_compressed(student)
            self.refit(student, one)
            descriptions += self.recover(student, one)
            if not one.is_last:
                self.results.measure_round(one.number, one.count, student)
        assert student is not None
        self.finish_recovery(student)
        return processes.run_on_first(lambda: self.collect(student, sizes, descriptions))

    def compress(self, one: Round, student: Student | None) -> Student:
        """Search the plan of a round, or load it, and execute it except its refits. The student may train afterwards.

        Raises:
            UserError: the compressed model cannot be exported in the requested format. This is checked before training.
        """
        self.plans.append(self.search(one, student))
        plan, config, model = plan_of(self.plans), self.config, self.model
        if one.is_last:
            self.keep_plan(plan)
        with self.record.timed("apply"):
            if student is None:
                student = apply(model, self.plans[-1], self._tape, refit=False)
            else:
                student.extend(self.plans[-1], self._tape)
                student.plan = plan
            prepare_student(student, self._stages_of(student), self._trained_layers(plan))
        if one.is_last and config.export.format == "stock" and config.export.enabled is not False:
            choose_layout(model, layer_shapes(model), config.export)
        if one.is_last and config.export.enabled is not False and processes.is_first():
            warn_of_little_room(self.folder, parameters.weights_bytes(model), "the exported model")
        return student

    def search(self, one: Round, student: Student | None) -> Plan:
        """Search the plan of a round, or load it."""
        with self.record.timed("search"):
            return find_plan(
                *(self.config, one.steps, self.model, self.tokens.calibration, self.record.inputs, self.folder),
                *(self.record.timed, one.plan_file, student),
            )

    def keep_plan(self, plan: Plan) -> None:
        """Draw and log the plan of the run. If it has several rounds, store it too."""
        if len(self.plans) > 1:
            keep_plan_of_rounds(self.folder, plan)
        if plan.operations and processes.is_first():
            draw_and_log(plan, self.model, self.folder, self.loggers)

    def measure_compressed(self, student: Student) -> None:
        """Measure the model after all operations of the plan except the refits of the last round."""
        if student.plan.operations:
            self.results.measure("compressed", student, untrained=True)
            return
        if self._stages_of(student) != list(self.stages):
            log.info("the model is not compressed, so next-token training replaces the distillation")
        self.results.profile_original()

    def refit(self, student: Student, one: Round) -> None:
        """Execute the refits of a round, if there are any; after the last round, measure the model."""
        if any(operation.kind == "refit" for operation in self.plans[-1].operations):
            with self.record.timed("refit"):
                errors = student.refit(self._tape)
            if one.is_last:
                self.record.keep_refit(errors)
                self.results.measure("refitted", student, untrained=True)

    def recover(self, student: Student, one: Round) -> list[dict[str, Any]]:
        """Train the student with a round's share of the recovery, and describe each stage of it for summary.json."""
        if self.config.recovery.objective == "none" or (not one.is_last and not student.plan.operations):
            return []
        log_footprint(student)
        stages, windows = stages_of(self._stages_of(student), self.tokens.stages, one)
        recovery = self._recovery(config_of(self.config, one), student, stages, windows)
        if self.memory is not None and (size := local_training_bytes(student, stages, recovery.layers)):
            self.memory.count_training(size)
        cached = recovery.keep_predictions(student)
        return recovery.recover(student, cached, lambda: self._load_whole(student))

    def finish_recovery(self, student: Student) -> None:
        """Measure the recovered student. On request, train the control for the steps of all rounds and measure it."""
        if self.config.recovery.objective == "none":
            return
        self.results.measure("recovered", student, original=self._load_original if self.memory is not None else None)
        plan = student.plan
        if self.config.recovery.control and plan.operations and not self.record.has("control"):
            recovery = self._recovery(self.config, student, self._stages_of(student), self.tokens.stages)
            with recovery.train_control(student):
                self.results.measure("control", Student(self.model, Plan(model=plan.model)), profiled=False)

    def _recovery(
        self, config: Config, student: Student, stages: Sequence[Stage], windows: Mapping[str, StageTokens]
    ) -> Recovery:
        return Recovery(
            *(config, stages, self._trained_layers(student.plan), self.folder, windows, self.tokenizer),
            *(self.device, self.record, self._callbacks, self.loggers),
        )

    def _stages_of(self, student: Student) -> list[Stage]:
        """Return the stages of the recovery. A student that is not compressed has no teacher."""
        if student.plan.operations:
            return list(self.stages)
        return [replace(stage, recovery=without_teacher(stage.recovery)) for stage in self.stages]

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
        config, model, plan = self.config, self.model, student.plan
        summary = summary_of(config, plan, sizes, model, self.tokens, self.record, recovery_stages)
        stored = quantized.stored_weights(config.model.path, config.model.revision) if config.model.path else None
        if stored and plan.operations:
            summary.count_bytes_on_disk(stored, parameters.weights_bytes(model))
        changed = bool(plan.operations) or config.recovery.objective != "none"
        if config.export.enabled is True or (config.export.enabled == "auto" and changed):
            with self.record.timed("export"):
                export_student(config, student, self.tokenizer, self.folder, summary, stored)
            tracking.log_export(self.loggers, self.folder / "model")
        if self.memory is not None:
            if layer_store(model).streamed:  # no recovery has loaded it into memory
                self.memory.take_peak()
            summary.memory = self.memory.to_dict()
        summary.seconds = self.record.seconds
        return summary.to_dict()
