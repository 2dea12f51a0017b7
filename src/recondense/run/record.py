"""What a run keeps on disk while it works: the figures of its result stages, seconds, and errors of a refit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recondense import processes
from recondense.files import JsonFolder

Figures = dict[str, Any]  # of one result stage: loss, perplexity, kl_to_original, tasks, profile


class RunRecord:
    """The folder `stages` of a run. A restarted run finds there what it measured before.

    All processes read it together; the first one writes.

    Args:
        folder: of the run.
        inputs: fingerprints of what the run depends on, by name.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, str]) -> None:
        self.inputs = dict(inputs)
        self._kept = JsonFolder(folder / "stages")
        self._shared = processes.SharedMapping(self._kept)
        self._nested = 0.0  # seconds of the parts timed within the one that is timed now

    def has(self, stage: str) -> bool:
        """Return whether a result stage has been measured."""
        return stage in self._shared

    def figures(self, stage: str) -> Figures:
        """Return the figures of a result stage."""
        return self._shared[stage]

    def keep(self, stage: str, figures: Figures) -> None:
        """Keep the figures of a result stage."""
        self._shared[stage] = figures

    @property
    def stages(self) -> Mapping[str, Figures]:
        """The figures of every result stage that was measured; of the first process."""
        return self._kept

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each part of the run so far, restarts included."""
        return dict(self._kept.get("seconds", {}))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time inside as seconds of `part`, less the time of parts within it."""
        started, outer, self._nested = time.perf_counter(), self._nested, 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            if processes.is_first():
                seconds = self.seconds
                self._kept["seconds"] = {**seconds, part: seconds.get(part, 0.0) + spent - self._nested}
            self._nested = outer + spent

    @property
    def recovery_seconds(self) -> dict[str, float]:
        """Seconds of each recovery stage so far, restarts included."""
        return dict(self._kept.get("recovery_seconds", {}))

    @contextmanager
    def timed_recovery(self, stage: str) -> Iterator[None]:
        """Count the time inside as seconds of a recovery stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.recovery_seconds if processes.is_first() else {}
            spent = time.perf_counter() - started
            self._shared["recovery_seconds"] = {**seconds, stage: seconds.get(stage, 0.0) + spent}

    def keep_refit(self, errors: Mapping[int, Mapping[str, float]]) -> None:
        """Keep the errors of each refitted layer; a restarted run keeps those of its first start."""
        if errors and processes.is_first():
            self._kept.setdefault("refit", {str(layer): dict(error) for layer, error in errors.items()})

    @property
    def refit_errors(self) -> dict[str, dict[str, float]]:
        """By layer: error of its output before and after the refit, relative to the original's; empty without one."""
        return self._kept.get("refit", {})
