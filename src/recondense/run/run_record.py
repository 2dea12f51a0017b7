"""Intermediate results of a run on disk: figures of its result stages, seconds, and errors of a refit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recondense import processes
from recondense.files import JsonFolder

REMEDY = "Delete this file, and the same command measures it again; or use overwrite=true to start over"
Figures = dict[str, Any]  # of one result stage: loss, perplexity, kl_to_original, tasks, profile


def name_of_round(number: int) -> str:
    """Return the name under which the figures of a round are stored."""
    return f"round-{number}"


class RunRecord:
    """The folder `stages` of a run, with which a restarted run reuses earlier measurements.

    All processes must read it together; only the first one writes.

    Args:
        folder: the run's folder.
        inputs: fingerprints of the run's inputs, by name.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, str]) -> None:
        self.inputs = dict(inputs)
        self._stored = JsonFolder(folder / "stages", REMEDY)
        self._shared = processes.SharedMapping(self._stored)
        self._nested = 0.0  # seconds of the parts inside the one that is being timed

    def has(self, stage: str) -> bool:
        """Return whether a result stage has been measured."""
        return stage in self._shared

    def figures(self, stage: str) -> Figures:
        """Return the figures of a result stage."""
        return self._shared[stage]

    def keep(self, stage: str, figures: Figures) -> None:
        """Store the figures of a result stage."""
        self._shared[stage] = figures

    @property
    def stages(self) -> Mapping[str, Figures]:
        """Figures of every measured result stage. Only the first process may read them."""
        return self._stored

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each part of the run so far, including earlier starts."""
        return dict(self._stored.get("seconds", {}))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the code inside to the seconds of `part`, without the time of nested parts."""
        started, outer, self._nested = time.perf_counter(), self._nested, 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            if processes.is_first():
                seconds = self.seconds
                self._stored["seconds"] = {**seconds, part: seconds.get(part, 0.0) + spent - self._nested}
            self._nested = outer + spent

    @property
    def recovery_seconds(self) -> dict[str, float]:
        """Seconds of each recovery stage so far, including earlier starts."""
        return dict(self._stored.get("recovery_seconds", {}))

    @contextmanager
    def timed_recovery(self, stage: str) -> Iterator[None]:
        """Add the time of the code inside to the seconds of a recovery stage, without that of evaluation."""
        started, evaluated = time.perf_counter(), self.seconds.get("evaluate", 0.0) if processes.is_first() else 0.0
        try:
            yield
        finally:
            seconds = self.recovery_seconds if processes.is_first() else {}
            evaluated = self.seconds.get("evaluate", 0.0) - evaluated if processes.is_first() else 0.0
            spent = time.perf_counter() - started - evaluated
            self._shared["recovery_seconds"] = {**seconds, stage: seconds.get(stage, 0.0) + spent}

    def keep_refit(self, errors: Mapping[int, Mapping[str, float]]) -> None:
        """Store the errors of each refitted layer, unless an earlier start of the run has stored them."""
        if errors and processes.is_first():
            self._stored.setdefault("refit", {str(layer): dict(error) for layer, error in errors.items()})

    @property
    def refit_errors(self) -> dict[str, dict[str, float]]:
        """For each refitted layer, the relative error of its output before and after; empty without a refit."""
        return self._stored.get("refit", {})
