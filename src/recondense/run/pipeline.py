"""The stages of a run in order: load, evaluate, search, apply, recover, measure, export. Reuses what is on disk."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from recondense import processes
from recondense.calibration.record import recorder
from recondense.config.schema import WORK, Config
from recondense.config.stages import stages_of, without_teacher
from recondense.data.texts import Texts
from recondense.evaluation import profiling
from recondense.export.export import export
from recondense.export.layout import layer_shapes, layout
from recondense.export.push import push_folder
from recondense.files import write_aside
from recondense.models import decoder, families, loading, parameters, quantized
from recondense.models.layer_store import layer_store
from recondense.models.model_files import history_of
from recondense.plan import Plan
from recondense.progress import configure, progress
from recondense.report import model_card, summary, tables, tracking
from recondense.report.structure_picture import picture_of
from recondense.run import launching, run_folder, tiny
from recondense.run.inputs import inputs_of, keep_inputs
from recondense.run.measure import Measure
from recondense.run.recover import Recovery, load_streamed, prepare_student
from recondense.run.resolved import Run
from recondense.run.search import find_plan, scratch_bytes
from recondense.surgery.student import Student, apply

log = logging.getLogger(__name__)

SLACK = 300 * 2**20  # of memory: libraries that are loaded later, the allocator, a block of texts


class MakeCallbacks(Protocol):
    """Gives the Lightning callbacks of a fit, by its stage (pretrain, recovery or a stage's own name, control or
    control/<stage>), tasks and folders of task files."""

    def __call__(self, stage: str, tasks: Sequence[str], include_path: Sequence[Path]) -> Sequence[Callback]: ...


def no_callbacks(stage: str, tasks: Sequence[str], include_path: Sequence[Path]) -> Sequence[Callback]:
    return ()


def run(run: Run, callbacks: MakeCallbacks = no_callbacks, command: Sequence[str] | None = None) -> Any:
    """One run, or what is left of it; the same config finds its folder again.

    Of several processes the first writes, prints and evaluates.

    Args:
        run: resolved; not one of sizes alone.
        callbacks: makes those of each Lightning Trainer.
        command: starts a further process of this run; None: what started this one.

    Returns:
        the metric that a sweep compares, None if this run does not measure it; a tuple for several.

    Raises:
        ConfigError: another process works in the folder.
        UserError, OSError: what the user can mend; the message says how.
    """
    config = run.config
    folder = config.run_folder()
    gpu = loading.device_of(config.model).type == "cuda"
    with launching.started(config.trainer, gpu, command):
        _quiet(config)
        with run_folder.lock_folder(folder, resumes=not config.overwrite):
            return _finish(run, callbacks, folder)


def _finish(run: Run, callbacks: MakeCallbacks, folder: Path) -> Any:
    """Run the stages that are not done, print the results and upload them; `run` says what it returns."""
    config = run.config
    done = processes.broadcast((folder / "summary.json").exists() and not config.overwrite)
    if not done:
        _Run(run, callbacks, folder).finish()
    if not processes.is_first():
        return None
    result = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder / WORK, ignore_errors=True)
    missing = _missing_upload(config, result)
    if done:
        state = "done but for the upload" if missing else "all done"
        print(f"{state}: {folder} holds this run; overwrite=true starts it anew")
    tables.print_report(result)
    print(f"\nresults: {folder}")
    if missing:
        with progress(f"pushing to {missing}"):
            push_folder(folder / "model", missing, config.export.private)
        result["artifacts"]["hub"] = missing
        _write_summary(folder, result)
    return summary.metric(result, config.metric)


def _missing_upload(config: Config, result: Mapping[str, Any]) -> str | None:
    """The repository that is to have the exported folder and has not; after a failure the same command tries again."""
    repository, artifacts = config.export.push_to_hub, result["artifacts"]
    return repository if "model" in artifacts and artifacts.get("hub") != repository else None


def _write_summary(folder: Path, result: Mapping[str, Any]) -> None:
    write_aside(folder / "summary.json", json.dumps(result, indent=1, allow_nan=False) + "\n")


def load(config: Config, callbacks: MakeCallbacks = no_callbacks) -> tuple[Any, Any]:
    """The model and tokenizer of a config; the embedded default is trained first if the cache lacks it."""
    settings = config.model
    path = settings.path or processes.by_first(lambda: _embedded(config, callbacks))
    pages = config.run_folder() / WORK / f"layers-{processes.rank()}" if settings.streaming else None
    with processes.first_before_others() if settings.path else nullcontext():  # a hub id is downloaded once
        return loading.load(settings, path, pages)


def _embedded(config: Config, callbacks: MakeCallbacks) -> Path:
    with processes.work_alone():  # its training must not depend on the number of processes
        return tiny.ensure(config.model, Path(config.cache_dir), config.trainer, callbacks("pretrain", (), ()))


def _quiet(config: Config) -> None:
    """Settings of the process: what it shows, and its threads."""
    configure(None if config.trainer.progress_bar and processes.is_first() else False)
    for logger in map(logging.getLogger, ("recondense", "callbacks")):
        if not logger.handlers:
            logger.addHandler(logging.StreamHandler())
            logger.setLevel(logging.INFO)
            logger.propagate = False  # Hydra's root handler would say everything twice
        if not processes.is_first():
            logger.setLevel(logging.ERROR)
    for noisy in ("DeepSpeed", "lightning.pytorch", "lightning.fabric", "transformers.tokenization_utils_base"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # "loading", "exporting": the stages have bars of their own
    # Lightning still asks torch in an old way; nothing that a user could mend.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # resuming is
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", module="lightning")
    if config.trainer.num_threads:
        torch.set_num_threads(config.trainer.num_threads)


class _Run:
    """The stages of one run. Each keeps its result in the folder and is skipped when that is there."""

    def __init__(self, run: Run, callbacks: MakeCallbacks, folder: Path) -> None:
        self.config = run.config
        self.stages = run.stages
        self.steps = run.steps
        self.callbacks = callbacks
        self.folder = folder
        self.loggers: list[Logger] = []
        self.memory: dict[str, int] = {}  # what the peak of a streamed run is made of, and the peak once it was taken

    def finish(self) -> None:
        """Run what is left, then write summary.json. Until all inputs have been read, the folder stays as it was."""
        config = self.config
        with processes.first_before_others():
            texts = Texts.read(config, self.stages, bool(self.steps))
        at_start = profiling.peak_resident_bytes()
        model, tokenizer = load(config, self.callbacks)
        inputs = inputs_of(config, model, tokenizer, texts, bool(self.steps))
        if processes.is_first():
            run_folder.begin(config, self.folder)
        keep_inputs(self.folder, inputs)
        wandb = config.logger.wandb
        named = replace(wandb, name=wandb.name or f"{config.experiment_name}-{config.run_hash()}")
        if processes.is_first():
            self.loggers = tracking.make_loggers(replace(config.logger, wandb=named), self.folder, config.resolved())
        try:
            measure = Measure(config, self.folder, model, tokenizer, texts, inputs)
            found = self._stages(measure, at_start)
            if not processes.is_first():
                return
            tracking.log_summary(self.loggers, found)
            _write_summary(self.folder, found)
        finally:
            tracking.finish_loggers(self.loggers)

    def _stages(self, measure: Measure, at_start: int) -> dict[str, Any]:
        """Measure, search, apply, recover and export; what summary.json says of it.

        Args:
            at_start: resident bytes at most before the model was loaded.
        """
        config, folder = self.config, self.folder
        model, tokenizer, texts = measure.model, measure.tokenizer, measure.texts
        if layer_store(model).streamed:
            self.memory = {
                "before_bytes": at_start,
                "outside_layers_bytes": parameters.bytes_outside_layers(model),
                "layer_bytes": parameters.largest_layer_bytes(model),
                "scratch_bytes": scratch_bytes(config, decoder.device(model), model),
            }
        measure.original()
        sizes = {"original": parameters.sizes(model)}
        with measure.timed("search"):
            plan = find_plan(config, self.steps, model, tokenizer, texts, measure.inputs, folder, measure.timed)
        if processes.is_first():
            self._show(plan, model)
        recovery = config.recovery if plan.operations else without_teacher(config.recovery)
        stages = self.stages if plan.operations else stages_of(replace(config, recovery=recovery))
        if recovery != config.recovery:
            log.info("nothing was compressed, so there is nothing to distil: next-token training in its place")
        changed = history_of(config.model).changed(len(decoder.decoder_layers(model)))
        layers = None if plan.operations else changed
        record = recorder(config, model, tokenizer, texts, folder, measure.timed)
        with measure.timed("apply"):
            student = apply(model, plan, record, refit=False)
            prepare_student(student, stages, layers)
        if config.export.format == "stock" and config.export.enabled is not False:
            layout(model, layer_shapes(model), config.export)  # or its error, before anything is trained
        sizes["compressed"] = parameters.sizes(model)
        if plan.operations:
            measure.stage("compressed", student)
        else:
            measure.unchanged(student)
        if any(operation.kind == "refit" for operation in plan.operations):
            with measure.timed("refit"):
                measure.keep_refit(student.refit(record))
            measure.stage("refitted", student)
        done = None
        if config.recovery.objective != "none":
            callbacks = partial(self._callbacks, measure)
            device = decoder.device(model)
            training = Recovery(
                *(config, stages, layers, folder, texts, tokenizer, device, measure, callbacks, self.loggers)
            )
            descriptions = self._recover(student, training)
            done = descriptions if config.recovery.stages or texts.counts else None
            measure.stage("recovered", student, self._original_again if config.model.streaming else None)
            if config.recovery.control and plan.operations and not measure.has("control"):
                with training.train_control(student):
                    measure.stage("control", Student(model, Plan(model=plan.model)))
        return processes.by_first(lambda: self._collect(measure, plan, recovery.objective, sizes, done))

    def _collect(
        self, measure: Measure, plan: Plan, objective: str, sizes: dict[str, Any], done: list[dict[str, Any]] | None
    ) -> dict[str, Any]:
        """What summary.json says, and the export."""
        config, folder, model = self.config, self.folder, measure.model
        found = summary.collect(
            *(config, objective, plan, sizes, model, measure.stages, measure.refit, measure.seconds),
            measure.texts.sha256(),
        )
        if done is not None:
            found["recovery_stages"] = done
        stored = quantized.stored(config.model.path, config.model.revision) if config.model.path else None
        if stored and plan.operations:
            found = summary.with_bytes_on_disk(found, stored, parameters.weights_bytes(model))
        changed = bool(plan.operations) or config.recovery.objective != "none"
        if config.export.enabled is True or (config.export.enabled == "auto" and changed):
            with measure.timed("export"), progress("exporting"):

                def card(exported: Path) -> str:
                    if stored and plan.operations:
                        size = quantized.bytes_on_disk(exported) or 0
                        found.update(summary.with_bytes_on_disk(found, stored, size))
                    return model_card.model_card(found)

                whole = replace(plan, history=history_of(config.model))
                kind = export(model, measure.tokenizer, whole, folder / "model", card, config.export)
            log.info("exported: %s (%s)", folder / "model", kind)
            found["artifacts"] |= {"model": "model", "export_format": kind}
            tracking.log_export(self.loggers, folder / "model")
        if layer_store(model).streamed:  # no recovery has brought it in
            self._take_peak()
        if self.memory:
            found["memory"] = self.memory
        found["seconds"] = measure.seconds
        return found

    def _take_peak(self) -> None:
        """What a model larger than memory took of it, printed, and a warning where that is more than it should be."""
        before = self.memory
        self.memory = found = {"peak_resident_bytes": profiling.peak_resident_bytes(), **before}
        bound = before["before_bytes"] + before["outside_layers_bytes"] + 2 * before["layer_bytes"]
        bound += before["scratch_bytes"] + SLACK
        shown = {name: tables.format_bytes(size) for name, size in found.items()}
        log.info(
            "peak memory %s: %s before the model, %s outside its layers, two layers of %s, scratch %s, and tokens",
            *(shown[f"{name}_bytes"] for name in ("peak_resident", "before", "outside_layers", "layer", "scratch")),
        )
        if found["peak_resident_bytes"] > bound:
            log.warning("peak memory is above the bound of %s; please report this", tables.format_bytes(bound))

    @contextmanager
    def _original_again(self) -> Iterator[Any]:
        """The original from its checkpoint, after the compressed model has taken its place."""
        with processes.work_alone():  # the first process alone evaluates
            original, _ = load(self.config, self.callbacks)
        yield original

    def _show(self, plan: Plan, model: Any) -> None:
        if not plan.operations:
            return
        facts = families.facts(model.config)
        picture = picture_of(plan.to_dict(), facts.num_experts, facts.moe_layers, self.folder / "plan.png")
        tracking.log_plan(self.loggers, plan.to_dict(), picture)

    def _callbacks(self, measure: Measure, stage: str, *, with_tasks: bool) -> Sequence[Callback]:
        tasks, include_path = (measure.tasks, measure.include_path) if with_tasks else ((), ())
        return self.callbacks(stage, tasks, include_path)

    def _recover(self, student: Student, training: Recovery) -> list[dict[str, Any]]:
        if student.has_original and processes.is_first():
            size = student.footprint()
            log.info(
                "student and teacher on one backbone: %s resident (the student alone %s; two whole models %s)",
                *(tables.format_bytes(number) for number in (size.with_original, size.student, size.apart)),
            )
        cached = training.keep_predictions(student)
        if layer_store(student.model).streamed:
            self._take_peak()
            load_streamed(student)
        return training.recover(student, cached)
