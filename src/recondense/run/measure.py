"""Measurements of a run: perplexity, divergence from the original, lm-eval tasks, memory and speed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense import processes
from recondense.calibration.calibrate import Timed
from recondense.config.schema import Config, EvaluationConfig
from recondense.evaluation.heldout_tasks import HELDOUT_TASKS, NEXT_LINE, note_tables, write_heldout_tasks
from recondense.evaluation.lm_eval import folder_tasks, run_tasks
from recondense.evaluation.perplexity import perplexity
from recondense.evaluation.profiling import profile_variants
from recondense.files import JsonFolder, fingerprint
from recondense.models.loading import weights_fingerprint
from recondense.models.parameters import sizes, weights_bytes
from recondense.progress import progress
from recondense.report.summary import MEASURING_PACKAGES
from recondense.run.inputs import task_files_fingerprint
from recondense.run.run_record import Figures, RunRecord, name_of_round
from recondense.surgery.student import Student

log = logging.getLogger(__name__)

Reference = Callable[[], AbstractContextManager[Any]]  # returns a context that yields the original


@dataclass(frozen=True)
class Tasks:
    """The lm-eval tasks of a run.

    Args:
        names: names of the tasks.
        folders: folders with task files.
    """

    names: Sequence[str] = ()
    folders: Sequence[Path] = ()


@dataclass
class Evaluator:
    """Measures the quality of models on the texts and tasks of one run.

    Args:
        settings: batch size, and settings of the tasks.
        tokenizer: tokenizer of all models.
        windows_NS: ids (N, S) of the validation windows; None to omit perplexity.
        tasks: names of lm-eval tasks.
        include_path: folders with task files.
        cache: results by a fingerprint of everything that determines them; all runs share it.
        identity: attention implementation, experts implementation and the tokenizer's fingerprint, which determine a
            result in addition to weights, texts and tasks.
        timed: context manager that counts the seconds of an evaluation.
        path: the setting of the original's path, in brackets, for messages.
    """

    settings: EvaluationConfig
    tokenizer: PreTrainedTokenizerBase
    windows_NS: Tensor | None
    tasks: Sequence[str]
    include_path: Sequence[Path]
    cache: MutableMapping[str, Figures]
    identity: tuple[str, str, str]
    timed: Timed
    path: str = ""

    @classmethod
    def of_run(
        cls,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        windows_NS: Tensor | None,
        tasks: Tasks,
        inputs: Mapping[str, str],
        timed: Timed,
    ) -> Evaluator:
        """Return the evaluator of a run.

        Args:
            config: settings of the run.
            tokenizer: tokenizer of the model.
            windows_NS: validation windows; None to omit perplexity.
            tasks: the run's lm-eval tasks.
            inputs: fingerprints of the run's inputs, by name.
            timed: context manager that counts the seconds of a part of the run.
        """
        return cls(
            config.evaluation,
            tokenizer,
            windows_NS,
            tasks.names,
            tasks.folders,
            processes.SharedMapping(JsonFolder(Path(config.cache_dir) / "evaluations")),
            (config.model.attention, config.model.experts, inputs["tokenizer"]),
            timed,
            f" (model.path={config.model.path})" if config.model.path else "",
        )

    def tasks_of(self, stage: str) -> Sequence[str]:
        """Return the tasks of a result stage; with evaluation.at_end=false, stages after `compressed` have none."""
        return self.tasks if self.settings.at_end or stage in ("original", "compressed") else []

    def evaluate(self, model: PreTrainedModel, stage: str, reference: Reference | None = None) -> Figures:
        """Measure perplexity and tasks of a model on the first process, and return the figures in all processes.

        Args:
            model: the model.
            stage: the result stage, which determines the tasks.
            reference: returns a context in which `model` is the original; None to omit kl_to_original.

        Returns:
            loss and kl_to_original (nats per token), perplexity, and the metrics of each task in `tasks`. Figures that
            were not measured are absent.
        """
        with self.timed("evaluate"):
            return processes.run_on_first(lambda: self._evaluate(model, stage, reference))

    def evaluate_once(
        self, model: PreTrainedModel, stage: str, reference: Reference | None, computes: Sequence[str]
    ) -> Figures:
        """Call `evaluate`, or return the cached figures of an equal model, original and texts from any run.

        Args:
            model, stage, reference: as for `evaluate`.
            computes: fingerprints of everything that determines the outputs of the model and its original.
        """
        key = self._key(model, stage, computes)
        if key not in self.cache:
            self.cache[key] = self.evaluate(model, stage, reference)
        return self.cache[key]

    def _key(self, model: PreTrainedModel, stage: str, computes: Sequence[str]) -> str:
        """Return a fingerprint of everything that determines the figures of a model."""
        tasks, settings = list(self.tasks_of(stage)), self.settings
        attention, experts, tokenizer = self.identity
        return fingerprint(
            list(computes),
            tasks,
            settings.batch_size,
            [settings.limit, settings.num_fewshot, tokenizer] if tasks else [],
            [task_files_fingerprint(folder) for folder in self.include_path] if tasks else [],
            str(model.device),
            attention,
            experts,
            [] if self.windows_NS is None else self.windows_NS.tolist(),  # they depend on the tokenizer
            [version(name) for name in MEASURING_PACKAGES],
        )

    def _evaluate(self, model: PreTrainedModel, stage: str, reference: Reference | None) -> Figures:
        figures: Figures = {}
        settings, tasks = self.settings, self.tasks_of(stage)
        if self.windows_NS is not None:
            description = f"perplexity: {stage}"
            name = f"the original{self.path}" if stage == "original" else f"the {stage} model"
            figures |= perplexity(model, self.windows_NS, settings.batch_size, reference, description, name)
        if tasks:
            figures["tasks"] = run_tasks(
                model,
                self.tokenizer,
                list(tasks),
                limit=settings.limit,
                num_fewshot=settings.num_fewshot,
                batch_size=settings.batch_size,
                include_path=self.include_path,
                description=f"lm-eval: {stage}",
            )
            if set(tasks) & set(HELDOUT_TASKS):
                note_tables(self.include_path[-1])
        return figures


class ResultStages:
    """Measures the result stages of a run once: original, compressed, refitted, recovered, control.

    Args:
        config: settings of the run.
        model: the model, which is measured in its current state.
        evaluator: measures quality.
        record: stores the figures.
    """

    def __init__(self, config: Config, model: PreTrainedModel, evaluator: Evaluator, record: RunRecord) -> None:
        self.config = config
        self.model = model
        self.evaluator = evaluator
        self.record = record

    def measure_original(self) -> None:
        """Measure the quality of the model as loaded."""
        if not self.record.has("original"):
            computes = [self.record.inputs["weights"]]
            self.record.keep("original", self.evaluator.evaluate_once(self.model, "original", None, computes))

    def profile_original(self) -> None:
        """Measure memory and speed of the original, for a run without a compressed stage."""
        figures = self.record.figures("original")
        if "profile" not in figures:
            profiles = self._profile("original", {"original": lambda: nullcontext(self.model)})
            self.record.keep("original", {**figures, "profile": profiles["original"]})

    def measure(
        self,
        stage: str,
        student: Student,
        *,
        untrained: bool = False,
        profiled: bool = True,
        original: Reference | None = None,
    ) -> None:
        """Measure the student in its current state, and for comparison memory and speed of its original.

        Args:
            stage: name of the result stage.
            student: the student.
            untrained: whether nothing has been trained since the plan was applied. The quality is then the same for all
                runs that differ only in their recovery, and cached.
            profiled: whether to measure memory and speed too.
            original: returns a context that yields the original, for a student that has released it.
        """
        if self.record.has(stage):
            return
        L.seed_everything(self.config.seed, verbose=False)
        reference = student.original if student.has_original else original
        if untrained:
            with self.record.timed("evaluate"):
                computes = [self.record.inputs["weights"], *computed_with(student)]
            figures = self.evaluator.evaluate_once(self.model, stage, reference, computes)
        else:
            figures = self.evaluator.evaluate(self.model, stage, reference)
        if profiled:
            variants: dict[str, Reference] = {"original": student.original} if student.has_original else {}
            profiles = self._profile(stage, {**variants, stage: lambda: nullcontext(self.model)})
            figures = {**figures, "profile": profiles[stage]}
            if student.has_original:
                figures["original_profile"] = profiles["original"]
        self.record.keep(stage, figures)

    def measure_round(self, number: int, count: int, student: Student) -> None:
        """Measure the quality of the student after one of several rounds, without tasks.

        Args:
            number: the number of the round, from 1.
            count: the number of rounds.
            student: the student in its current state.
        """
        stage = name_of_round(number)
        if self.record.has(stage):
            return
        evaluator = replace(self.evaluator, tasks=())
        figures = evaluator.evaluate(self.model, stage, student.original if student.has_original else None)
        shown = ", ".join(f"{name} {figures[name]:.4g}" for name in ("perplexity", "kl_to_original") if name in figures)
        total = sizes(self.model)["total"]
        log.info("round %d of %d: %d parameters%s", number, count, total, f", {shown}" if shown else "")
        self.record.keep(stage, {**figures, "parameters": total})

    def _profile(self, stage: str, variants: Mapping[str, Reference]) -> dict[str, Figures]:
        with self.record.timed("profile"):
            return processes.run_on_first(lambda: profile(self.model, stage, variants, self.config))


def computed_with(student: Student) -> list[str]:
    """Return fingerprints of everything that determines a student's outputs: weights, operations, and buffers."""
    model = student.model
    buffers = {
        key: buffer.double().tolist()
        for key, buffer in model.named_buffers()
        if buffer.device.type != "meta"  # `weights_fingerprint` includes the buffers of streamed layers
    }
    return [weights_fingerprint(model), fingerprint(student.plan.to_dict()["operations"], buffers)]


def profile(
    model: PreTrainedModel, stage: str, variants: Mapping[str, Reference], config: Config
) -> dict[str, Figures]:
    """Measure memory and speed of variants of one model.

    Args:
        model: the model.
        stage: name of the result stage, for the progress bar.
        variants: for each name, a function that returns a context in which the model is that variant.
        config: settings of the run. For a streamed model, whose speed depends on the disk, only the bytes of its
            weights are counted.

    Returns:
        For each variant, the bytes of its weights, its peak memory in bytes, and its speed in tokens per second.
    """
    settings = config.callbacks.profile
    if not settings.enabled or config.model.streaming:
        figures = {}
        for variant, context in variants.items():
            with context():
                figures[variant] = {"weights_bytes": weights_bytes(model)}
        return figures
    with progress(f"memory and speed: {stage}"):
        profiles = profile_variants(
            variants,
            batch_size=settings.batch_size,
            prompt_length=settings.prompt_length,
            new_tokens=settings.new_tokens,
            repetitions=settings.repetitions,
            vocab_size=model.config.vocab_size,
            device=model.device,
            seed=config.seed,
        )
    return {variant: measured.to_dict() for variant, measured in profiles.items()}


def make_tasks(config: Config, validation: Sequence[str] | None) -> Tasks:
    """Return the tasks of a run, after writing the held-out tasks to the cache folder.

    Args:
        config: settings of the run.
        validation: the run's validation texts; None if there are none.

    Raises:
        UserError: the validation texts are too few for the questions of a task that is named without the other one.
    """
    evaluation = config.evaluation
    folders = [Path(evaluation.include_path)] if evaluation.include_path else []
    tasks = list(folder_tasks(folders) if folders and evaluation.tasks is None else evaluation.tasks or ())
    if config.model.streaming and tasks:
        log.info("model.streaming: lm-eval cannot evaluate a streamed model; skipped: %s", ", ".join(tasks))
        return Tasks((), folders)
    heldout = [task for task in tasks if task in HELDOUT_TASKS]
    if not heldout:
        return Tasks(tasks, folders)
    if validation is None:
        log.warning("there is no validation text, so these are not measured: perplexity, %s", ", ".join(heldout))
        return Tasks([task for task in tasks if task not in heldout], folders)
    settings = evaluation.heldout
    sizes = {} if settings is None else vars(settings)
    folder = Path(config.cache_dir) / "tasks" / fingerprint(validation, sizes)
    # The default names both. A task that is named alone is what the user asks for.
    written = write_heldout_tasks(folder, validation, **sizes, strict=heldout == [NEXT_LINE])
    if absent := [task for task in heldout if task not in written]:
        log.warning("the validation texts have too few lines, so these are not measured: %s", ", ".join(absent))
    return Tasks([task for task in tasks if task not in absent], [*folders, folder])
