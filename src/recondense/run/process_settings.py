"""Settings of each process of a run: logging, progress bars, warnings, and threads."""

from __future__ import annotations

import logging
import sys
import warnings

import torch
import transformers
from lightning.fabric.utilities.rank_zero import rank_zero_only

from recondense import processes
from recondense.config.schema import TrainerConfig
from recondense.progress import allow_bars

NOISY = ("DeepSpeed", "lightning.pytorch", "lightning.fabric", "transformers.tokenization_utils_base")


class _StderrHandler(logging.StreamHandler):
    """Write to `sys.stderr` as it is at the time: a command replaces it while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure_process(settings: TrainerConfig) -> None:
    """Let the first process log and show progress bars, and the others log only errors; set the number of threads."""
    # Lightning reads it from variables, which another program may have left.
    rank_zero_only.rank = processes.rank()  # type: ignore[attr-defined]
    allow_bars(None if settings.progress_bar and processes.is_first() else False)
    for logger in map(logging.getLogger, ("recondense", "callbacks")):
        if not logger.handlers:
            logger.addHandler(_StderrHandler())
            logger.setLevel(logging.INFO)
            logger.propagate = False  # Hydra's root handler would print every line twice
        if not processes.is_first():
            logger.setLevel(logging.ERROR)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # the run shows its own bars "loading" and "exporting"
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # when a run resumes
    # Lightning calls a deprecated function of torch, which users cannot change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", module="lightning")
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
