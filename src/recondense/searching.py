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

from recondense import families, surgery
from recondense.cache import JsonFolder, fingerprint, waiting_lock
from recondense.calibrate import TEXTS_PER_BLOCK, Tape
from recondense.config import Config
from recondense.corpora import Corpora, load_corpora
from recondense.data import CalibrationSet, calibration_set, pack
from recondense.plan import Condense, Drop, Operation, Plan, Refit
from recondense.progress import progress

log = logging.getLogger(__name__)


Timed = Callable[[str], AbstractContextManager[None]]
RIDGE = 1e-2  # of a refit, relative to the mean diagonal: a pull towards the weights as they are


class MethodStep(Protocol):
    """What the pipeline asks of a step of a method."""

    def check(self, facts: families.Facts) -> list[str]: ...

    def key(self) -> dict[str, Any]: ...

    def search(
        self, model: PreTrainedModel, tape: Callable[[], Tape], cache: Any, max_scratch_bytes: int
    ) -> tuple[list[Operation], dict[str, Any]]: ...


@dataclass
class Texts:
    """The corpora of a run, and their token windows, each made once."""

    corpora: Corpora
    _windows: dict[str, Tensor | None] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Config, calibrates: bool) -> Texts:
        """Read the splits that this run needs."""
        wanted = ["validation"] if config.evaluation.name != "none" or config.recovery.validate_every else []
        wanted += ["calibration"] if calibrates else []
        wanted += ["train"] if config.recovery.objective != "none" else []
        return cls(load_corpora(config.data, wanted))

    def windows(self, split: str, tokenizer: PreTrainedTokenizerBase | None, length: int) -> Tensor | None:
        """Packed windows (N, length) of a split; None if the run has no such text."""
        if split not in self._windows:
            texts = getattr(self.corpora, split)
            assert tokenizer is not None
            self._windows[split] = None if texts is None else pack(texts, tokenizer, length, f"the {split} text")
        return self._windows[split]


def recorder(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    timed: Timed = lambda name: nullcontext(),
) -> Callable[[], Tape]:
    """What tapes the model on the run's calibration set, as it is when called."""

    def record() -> Tape:
        blocks = list(calibration(config, tokenizer, texts).blocks(TEXTS_PER_BLOCK))
        with timed("calibrate"), progress("calibrating", len(blocks)) as bar:
            return Tape.record(model, blocks, advance=bar.advance)

    return record


def calibration(config: Config, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> CalibrationSet:
    """The run's calibration set."""
    settings = config.data.calibration
    return calibration_set(texts.corpora.calibration or [], tokenizer, settings.num_samples, settings.max_length)


def find_plan(
    config: Config,
    steps: Sequence[MethodStep],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    weights: str,
    folder: Path,
    timed: Timed = lambda name: nullcontext(),
) -> Plan:
    """The run's plan: from its folder, or searched step by step with all that the cache knows.

    Each step sees the model as the previous ones left it; the model is left as it was.

    Args:
        weights: the fingerprint of the model's weights.
        folder: of the run; plan.json is written there.
        timed: counts the time of a stage.

    Raises:
        ValueError: the folder's plan was made from other weights or another calibration set.
    """
    path = folder / "plan.json"
    name = str(config.model.path or config.model.name)
    if not steps:
        return Plan(model=name)
    found = {"weights": weights, "calibration": calibration(config, tokenizer, texts).fingerprint()}
    record_tape = recorder(config, model, tokenizer, texts, timed)
    if path.exists():
        plan = Plan.load(path)
        changed = [what for what in found if plan.fingerprint.get(what) != found[what]]
        if changed:
            raise ValueError(
                f"run_dir={folder}: the {' and the '.join(changed)} changed since this run began; "
                "overwrite=true starts it anew"
            )
        log.info("plan: found in %s", path)
        return plan
    operations: list[Operation] = []
    records: list[dict[str, Any]] = []
    originals: dict[int, nn.Module] = {}
    try:
        for step in steps:
            chosen, record = search_step(config, step, model, record_tape, found, operations)
            operations += chosen
            records.append(record)
            if step is not steps[-1]:
                taken = surgery.apply(model, Plan(model=name, operations=tuple(chosen)), record_tape)
                originals = {**taken, **originals}
    finally:
        for layer, block in originals.items():
            families.set_block(model, layer, block)
    operations += refits(operations, config.method.get("refit", False))
    method = fingerprint([step.key() for step in steps], dict(config.method))
    search = records[0] if len(records) == 1 else {"steps": records}
    plan = Plan(name, tuple(operations), {**found, "method": method}, search)
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
    folder = Path(config.cache_dir) / "search" / fingerprint(dict(found), TEXTS_PER_BLOCK, step.key(), earlier)
    folder.mkdir(parents=True, exist_ok=True)

    tape = cache(record)
    with waiting_lock(folder / ".lock", "searches the same"):
        chosen, found_by = step.search(model, tape, JsonFolder(folder), scratch_bytes(config, model.device))
    if found_by.get("reused"):
        log.info("search: reused %s from %s", found_by["reused"], folder)
    return chosen, found_by


def scratch_bytes(config: Config, device: torch.device) -> int:
    """The bound on temporary tensors: as configured, or a quarter of the memory that is free now."""
    wanted = config.scratch_bytes()
    if wanted is not None:
        return wanted
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return max(free // 4, 1 << 26)
