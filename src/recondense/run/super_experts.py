"""The super experts of a run: found before the first step of the search, and compared with the operations after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from recondense import processes
from recondense.calibration.super_experts import find_super_experts
from recondense.calibration.tape import TEXTS_PER_BATCH, Tape
from recondense.files import JsonFolder, fingerprint, hold_lock
from recondense.methods.search.protection import SuperExperts
from recondense.methods.step import Cache, Record
from recondense.operations import Operation
from recondense.progress import progress

log = logging.getLogger(__name__)

NAME = "super-experts"  # of the record in the cache
VERSION = 1  # of the definition of a super expert


def super_experts_of(tape: Callable[[], Tape], cache: Cache) -> SuperExperts:
    """Find the super experts of a model, or read them from the cache, and name them in the log.

    Args:
        tape: returns the tape of the uncompressed model; it is only called if the cache lacks the record.
        cache: where the record is kept.
    """
    record = cache.get(NAME)
    if record is None:
        recorded = tape()
        with progress("super experts", len(recorded.states) - 1) as bar:
            outputs = find_super_experts(recorded, bar.advance)
        record = cache[NAME] = {"outputs": [[layer, list(experts.items())] for layer, experts in outputs.items()]}
    super_experts = SuperExperts({int(layer): {int(e): v for e, v in pairs} for layer, pairs in record["outputs"]})
    if super_experts.outputs:
        log.warning(super_experts.describe())
    return super_experts


def cached_super_experts(
    folder: Path, decided_by: Mapping[str, str], rounding: Sequence[str], tape: Callable[[], Tape]
) -> SuperExperts:
    """Find the super experts of a run's model; other runs with the same weights and calibration set share the result.

    Args:
        folder: the folder of cached searches.
        decided_by: fingerprints of the model's weights and of the calibration set.
        rounding: how the tape rounds states.
        tape: records the tape of the uncompressed model.
    """
    folder = folder / fingerprint(NAME, VERSION, dict(decided_by), TEXTS_PER_BATCH, *rounding)
    lock = hold_lock(folder / ".lock", "looks for super experts") if processes.is_first() else nullcontext()
    with lock:
        return super_experts_of(tape, processes.SharedMapping(JsonFolder(folder)))


def report_super_experts(super_experts: SuperExperts, operations: Sequence[Operation]) -> Record:
    """Warn of super experts that operations lose.

    Returns:
        The entry of plan.json's search record; empty if the model has no super experts.
    """
    if not super_experts.outputs:
        return {}
    for warning in super_experts.warnings(operations):
        log.warning(warning)
    return {"super_experts": super_experts.record(operations)}
