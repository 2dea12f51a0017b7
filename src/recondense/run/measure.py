"""What a run measures of each stage: perplexity, divergence from the original, lm-eval tasks, memory and speed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense import processes
from recondense.config.schema import Config
from recondense.data.texts import Texts
from recondense.evaluation.heldout_tasks import HELDOUT_TASKS, heldout_tasks
from recondense.evaluation.lm_eval import folder_tasks, run_tasks
from recondense.evaluation.perplexity import perplexity
from recondense.evaluation.profiling import profile_variants
from recondense.files import JsonFolder, fingerprint
from recondense.models.loading import weights_fingerprint
from recondense.models.parameters import weights_bytes
from recondense.progress import progress
from recondense.run.inputs import task_files_fingerprint
from recondense.surgery.student import Student

log = logging.getLogger(__name__)

Reference = Callable[[], AbstractContextManager[Any]]


class Measure:
    """Measures stages once each, and keeps what it found in the run's folder.

    Args:
        texts: the validation text gives perplexity and the held-out tasks; without it both are left out.
        inputs: fingerprints of what the run depends on, by name.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Texts,
        inputs: Mapping[str, str],
    ) -> None:
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.texts = texts
        self.inputs = inputs
        self.stages = JsonFolder(folder / "stages")
        self._of_all = processes.FirstProcess(self.stages)
        self._within = 0.0
        self.windows = self._windows()
        with processes.first_before_others():
            self.tasks, self.include_path = self._tasks()
        if config.model.streaming and self.tasks:
            log.info("model.streaming: lm-eval needs a whole model; %s left out", ", ".join(self.tasks))
            self.tasks = []

    @property
    def weights(self) -> str:
        """The fingerprint of the original's weights."""
        return self.inputs["weights"]

    @property
    def seconds(self) -> dict[str, float]:
        """What each part of the run has taken so far, restarts included."""
        return dict(self.stages.get("seconds", {}))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time inside as that of `name`, less that of parts timed within."""
        started, outer, self._within = time.perf_counter(), self._within, 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            if processes.is_first():
                seconds = self.seconds
                self.stages["seconds"] = {**seconds, name: seconds.get(name, 0.0) + spent - self._within}
            self._within = outer + spent

    @property
    def recovery_seconds(self) -> dict[str, float]:
        """Seconds of each stage of the recovery so far, restarts included."""
        return dict(self.stages.get("recovery_seconds", {}))

    @contextmanager
    def timed_recovery(self, name: str) -> Iterator[None]:
        """Count the time inside as that of a stage of the recovery."""
        started = time.perf_counter()
        try:
            yield
        finally:
            counts = self.recovery_seconds if processes.is_first() else {}
            self._of_all["recovery_seconds"] = {**counts, name: counts.get(name, 0.0) + time.perf_counter() - started}

    def has(self, name: str) -> bool:
        return name in self._of_all

    def keep_refit(self, errors: Mapping[int, Mapping[str, float]]) -> None:
        """Keep what a refit says of each layer; a restarted run keeps what its first start found."""
        if errors and processes.is_first():
            self.stages.setdefault("refit", {str(layer): dict(error) for layer, error in errors.items()})

    @property
    def refit(self) -> dict[str, dict[str, float]]:
        """By layer: error of its output before and after the refit, relative to the original's; empty without one."""
        return self.stages.get("refit", {})

    def original(self) -> None:
        """Measure the model as it was loaded; equal models and texts are evaluated once for all runs."""
        if not self.has("original"):
            self._of_all["original"] = self._once([self.weights], "original", None, self.tasks)

    def _once(
        self, computes: Sequence[str], name: str, reference: Reference | None, tasks: list[str]
    ) -> dict[str, Any]:
        """The quality of a model; equal models, originals and texts are evaluated once for all runs.

        Args:
            computes: fingerprints of all that the model, and what it is compared with, compute with.
        """
        config = self.config
        key = fingerprint(
            list(computes),
            tasks,
            config.evaluation.batch_size,
            [config.evaluation.limit, config.evaluation.num_fewshot, self.inputs["tokenizer"]] if tasks else [],
            [task_files_fingerprint(folder) for folder in self.include_path] if tasks else [],
            str(self.model.device),
            config.model.attention,
            config.model.experts,
            [] if self.windows is None else self.windows.tolist(),  # the tokenizer's doing
            [version(name) for name in ("torch", "transformers", "lm-eval", "datasets")],
        )
        known = processes.FirstProcess(JsonFolder(Path(config.cache_dir) / "evaluations"))
        if key not in known:
            with self.timed("evaluate"):
                known[key] = processes.by_first(lambda: self._quality(name, reference, tasks))
        return known[key]

    def unchanged(self, student: Student) -> None:
        """Memory and speed of the original alone, where no surgery gives it a counterpart."""
        if "profile" not in (original := self._of_all["original"]):
            with self.timed("profile"):
                profile = processes.by_first(lambda: self._profiles("original", student)["original"])
            self._of_all["original"] = {**original, "profile": profile}

    def stage(self, name: str, student: Student, original: Reference | None = None) -> None:
        """Measure the model as it is now, against the original where surgery has set one aside.

        Args:
            original: a context with the original where the student has none any more.
        """
        if self.has(name):
            return
        L.seed_everything(self.config.seed, verbose=False)
        reference = student.original if student.has_original else original
        wanted = self.tasks if self.config.evaluation.at_end or name == "compressed" else []
        if name in ("compressed", "refitted"):  # not trained: the same for runs that differ in their recovery alone
            plan = student.plan.to_dict()["operations"]
            buffers = {
                key: buffer.double().tolist()
                for key, buffer in self.model.named_buffers()
                if buffer.device.type != "meta"  # a streamed layer's are among the weights
            }
            with self.timed("evaluate"):
                computes = [self.weights, weights_fingerprint(self.model), fingerprint(plan, buffers)]
            found = self._once(computes, name, reference, wanted)
        else:
            with self.timed("evaluate"):
                found = processes.by_first(lambda: self._quality(name, reference, wanted))
        if name != "control":
            with self.timed("profile"):
                profiles = processes.by_first(lambda: self._profiles(name, student))
            if profiles:
                found["profile"] = profiles.pop(name)
                if "original" in profiles:
                    found["original_profile"] = profiles["original"]
        self._of_all[name] = found

    def _quality(self, name: str, reference: Reference | None, tasks: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        evaluation = self.config.evaluation
        if self.windows is not None:
            found |= perplexity(
                self.model, self.windows, evaluation.batch_size, reference, description=f"perplexity: {name}"
            )
        if tasks:
            found["tasks"] = run_tasks(
                self.model,
                self.tokenizer,
                tasks,
                limit=evaluation.limit,
                num_fewshot=evaluation.num_fewshot,
                batch_size=evaluation.batch_size,
                include_path=self.include_path,
                description=f"lm-eval: {name}",
            )
        return found

    def _profiles(self, name: str, student: Student) -> dict[str, Any]:
        settings = self.config.callbacks.profile
        variants: dict[str, Reference] = {name: lambda: nullcontext(self.model)}
        if student.has_original:
            variants = {"original": student.original, **variants}
        if not settings.enabled or self.config.model.streaming:  # there is no speed of what is read from disk
            found = {}
            for variant, context in variants.items():
                with context():
                    found[variant] = {"weights_bytes": weights_bytes(self.model)}
            return found
        with progress(f"memory and speed: {name}"):
            profiles = profile_variants(
                variants,
                batch_size=settings.batch_size,
                prompt_length=settings.prompt_length,
                new_tokens=settings.new_tokens,
                repetitions=settings.repetitions,
                vocab_size=self.model.config.vocab_size,
                device=self.model.device,
                seed=self.config.seed,
            )
        return {variant: profile.to_dict() for variant, profile in profiles.items()}

    def _windows(self) -> Tensor | None:
        if self.config.evaluation.name == "none":
            return None
        windows = self.texts.windows("validation", self.tokenizer, self.config.data.sequence_length)
        return None if windows is None else windows[: self.config.evaluation.perplexity_windows]

    def _tasks(self) -> tuple[list[str], list[Path]]:
        """The tasks of this run and the folders of their files; held-out ones are written here."""
        evaluation = self.config.evaluation
        folders = [Path(evaluation.include_path)] if evaluation.include_path else []
        tasks = list(folder_tasks(folders) if folders and evaluation.tasks is None else evaluation.tasks or ())
        own = [task for task in tasks if task in HELDOUT_TASKS]
        if not own:
            return tasks, folders
        if (validation := self.texts.documents("validation", self.tokenizer)) is None:
            log.warning("no validation text: perplexity and %s are left out", ", ".join(own))
            return [task for task in tasks if task not in own], folders
        settings = evaluation.heldout
        sizes = {} if settings is None else vars(settings)
        key = fingerprint(validation, sizes)
        folder = Path(self.config.cache_dir) / "tasks" / key
        heldout_tasks(folder, validation, **sizes)
        return tasks, [*folders, folder]
