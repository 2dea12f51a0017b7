"""From texts to a Plan: corpora and windows of a run, and the search that is made once and reused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense import families, paging, processes, surgery
from recondense.calibrate import TEXTS_PER_BLOCK, Tape
from recondense.config import Config
from recondense.corpora import Corpora, load_corpora
from recondense.data import CalibrationSet, Table, calibration_set, pack, require_samples
from recondense.errors import UserError
from recondense.files import JsonFolder, fingerprint, waiting_lock
from recondense.instructions import Record
from recondense.packing import examples_of, windows_of
from recondense.plan import Condense, Drop, Operation, Plan, Refit
from recondense.progress import progress
from recondense.run_folder import WORK
from recondense.shelves import Disk, Memory, Storage
from recondense.stages import Stage, renamed, stages_of
from recondense.templates import as_texts

log = logging.getLogger(__name__)


Timed = Callable[[str], AbstractContextManager[None]]
RIDGE = 1e-2  # of a refit, relative to the mean diagonal: a pull towards the weights as they are


class MethodStep(Protocol):
    """What the pipeline asks of a step of a method."""

    def check(self, facts: families.Facts) -> list[str]: ...

    def key(self) -> dict[str, Any]: ...

    @property
    def left_open(self) -> str: ...

    def outline(self, model: PreTrainedModel) -> Sequence[Operation]: ...

    def search(
        self, model: PreTrainedModel, tape: Callable[[], Tape], cache: Any, max_scratch_bytes: int
    ) -> tuple[list[Operation], dict[str, Any]]: ...


@dataclass
class Texts:
    """The corpora of a run, and their token windows, each made once.

    Args:
        own: corpora of the stages that train on others than the run's, by the stage's name.
        counts: what was cut and left out of supervised examples, by stage and split.
    """

    corpora: Corpora
    own: dict[str, Corpora] = field(default_factory=dict)
    counts: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)
    _windows: dict[tuple[str, int], Tensor | None] = field(default_factory=dict)
    _training: dict[tuple[str, str], Table | None] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Config, calibrates: bool) -> Texts:
        """Read the splits that this run needs.

        Raises:
            UserError: texts that cannot be read, or too few of them.
        """
        stages = stages_of(config) if config.recovery.objective != "none" else []
        shared = [stage for stage in stages if not stage.own_texts]
        validates = any(stage.recovery.validate_every for stage in shared)
        wanted = ["validation"] if config.evaluation.name != "none" or validates else []
        wanted += ["calibration"] if calibrates else []
        wanted += ["train"] if shared else []
        own = {stage.name: _corpora_of(stage) for stage in stages if stage.own_texts}
        corpora = load_corpora(config.data, wanted)
        if calibrates:
            require_samples(corpora.calibration or [], config.data.calibration.num_samples)
        return cls(corpora, own)

    def sha256(self) -> dict[str, str]:
        """The hash of every split, those of stages as <stage>/<split>."""
        own = {f"{name}/{split}": sha for name, corpora in self.own.items() for split, sha in corpora.sha256().items()}
        return {**self.corpora.sha256(), **own}

    def documents(self, split: str, tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
        """The run's documents of a split as plain texts; None if it has none."""
        found = getattr(self.corpora, split)
        return None if found is None else as_texts(found, tokenizer)

    def windows(self, split: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor | None:
        """Packed windows (N, length) of a split; None if the run has no such text."""
        if (split, length) not in self._windows:
            texts = self.documents(split, tokenizer)
            found = None if texts is None else pack(texts, tokenizer, length, f"the {split} text")
            self._windows[split, length] = found
        return self._windows[split, length]

    def training(self, stage: Stage, split: str, tokenizer: PreTrainedTokenizerBase | None) -> Table | None:
        """Windows of a stage's split: of records with the labels of their answers, of texts as they are packed."""
        assert tokenizer is not None
        if (stage.name, split) not in self._training:
            self._training[stage.name, split] = self._windows_of(stage, split, tokenizer)
        return self._training[stage.name, split]

    def _windows_of(self, stage: Stage, split: str, tokenizer: PreTrainedTokenizerBase) -> Table | None:
        found = getattr(self.own.get(stage.name, self.corpora), split)
        length, name = stage.data.sequence_length, f"the {split} text"
        records = [document for document in found or () if isinstance(document, Record)]
        if found is None or not records:
            if not stage.own_texts:
                windows = self.windows(split, tokenizer, length)
            else:
                windows = None if found is None else pack(found, tokenizer, length, f"{name} of stage {stage.name}")
            return None if windows is None else {"input_ids": windows}
        examples = examples_of(records, tokenizer, length, f"{stage.where}, the {split} records")
        self.counts[stage.name, split] = {
            "examples": len(examples.kept), "left_out": examples.left_out, "cut": examples.cut
        }  # fmt: skip
        filler = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        return windows_of(examples.kept, length, filler, stage.data.packing)


def _corpora_of(stage: Stage) -> Corpora:
    """The texts that a stage has of its own."""
    wanted = ["train", "validation"] if stage.recovery.validate_every else ["train"]
    try:
        return load_corpora(stage.data, wanted)
    except UserError as error:
        raise UserError(renamed(str(error), f"{stage.where}.data")) from error


def recorder(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    folder: Path,
    timed: Timed = lambda name: nullcontext(),
    split: bool = False,
) -> Callable[[], Tape]:
    """What tapes the model on the run's calibration set, as it is when called.

    Args:
        folder: of the run; a tape on disk lies in it.
        split: the processes share the texts; without it each tapes all of them.
    """

    def record() -> Tape:
        blocks = list(calibration(config, tokenizer, texts).blocks(TEXTS_PER_BLOCK))
        with timed("calibrate"), progress("calibrating", len(families.decoder_layers(model))) as bar:
            return Tape.record(model, blocks, bar.advance, _storage(config, model, folder), split)

    return record


def _storage(config: Config, model: PreTrainedModel, folder: Path) -> Storage:
    """Where a tape lies; that of a model larger than memory is found again by a run that goes on."""
    settings, streamed = config.data.calibration, paging.is_streamed(model)
    if settings.tape == "memory" or (settings.tape == "auto" and not streamed):
        return Memory()
    dtype = torch.bfloat16 if settings.tape_dtype == "bfloat16" else None
    name = f"tape-{fingerprint(paging.standing(model), settings.tape_dtype, TEXTS_PER_BLOCK)}" if streamed else "tape"
    return Disk(folder / WORK / name, dtype, families.device(model), keeps=streamed)


def _rounded(config: Config, model: PreTrainedModel) -> list[str]:
    """What the tape's states are rounded to: part of what decides a search."""
    rounds = config.data.calibration.tape_dtype == "bfloat16" and model.dtype != torch.bfloat16
    return ["tape in bfloat16"] if rounds else []


def calibration(config: Config, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> CalibrationSet:
    """The run's calibration set."""
    settings = config.data.calibration
    documents = texts.documents("calibration", tokenizer) or []
    return calibration_set(documents, tokenizer, settings.num_samples, settings.max_length)


def find_plan(
    config: Config,
    steps: Sequence[MethodStep],
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
    paging.identify(model, fingerprint(found))
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
                taken = surgery.apply(model, Plan(model=name, operations=tuple(chosen)), record_whole)
                originals = {**taken, **originals}
    finally:
        for layer, block in originals.items():
            families.set_block(model, layer, block)
    operations += refits(operations, config.method.get("refit", False))
    method = fingerprint([step.key() for step in steps], dict(config.method))
    search = records[0] if len(records) == 1 else {"steps": records}
    plan = processes.broadcast(Plan(name, tuple(operations), {**found, "method": method}, search))
    if processes.is_first():
        plan.save(path)
    return plan


def refits(operations: Sequence[Operation], wanted: bool | str) -> list[Refit]:
    """A refit of every layer that operations changed and left, lowest first.

    Args:
        wanted: `method.refit`: false, true (down_proj), or coefficients (of condensed layers only).
    """
    if not wanted:
        return []
    gone = {operation.layer for operation in operations if isinstance(operation, Drop)}
    condensed = {operation.layer for operation in operations if isinstance(operation, Condense)}
    layers = condensed if wanted == "coefficients" else {operation.layer for operation in operations}
    what: Any = "coefficients" if wanted == "coefficients" else "down_proj"
    return [Refit(layer, what, RIDGE) for layer in sorted(layers - gone)]


def search_step(
    config: Config,
    step: MethodStep,
    model: PreTrainedModel,
    record: Callable[[], Tape],
    found: Mapping[str, str],
    before: Sequence[Operation],
) -> tuple[list[Operation], dict[str, Any]]:
    """Search one step with the cached orders that weights, calibration and the step's settings name."""
    earlier = Plan(model="", operations=tuple(before)).to_dict()["operations"]
    key = fingerprint(dict(found), TEXTS_PER_BLOCK, step.key(), earlier, *_rounded(config, model))
    folder = Path(config.cache_dir) / "search" / key
    folder.mkdir(parents=True, exist_ok=True)

    tape = cache(record)
    alone = waiting_lock(folder / ".lock", "searches the same") if processes.is_first() else nullcontext()
    with alone:
        scratch = scratch_bytes(config, families.device(model), model)
        chosen, found_by = step.search(model, tape, processes.FirstProcess(JsonFolder(folder)), scratch)
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
    wanted = config.scratch_bytes()
    if wanted is not None:
        return wanted
    if model is not None and paging.is_streamed(model):
        return max(paging.page_bytes(model), 1 << 26)
    on_cpu = psutil.virtual_memory().available // processes.world_size()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else on_cpu
    return processes.broadcast(max(free // 4, 1 << 26))
