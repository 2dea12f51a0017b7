"""Settings of a process of a run: log lines, progress bars, warnings, threads."""

from __future__ import annotations

import logging
import warnings

import torch
import transformers

from recondense import processes
from recondense.config.schema import TrainerConfig
from recondense.progress import allow_bars

NOISY = ("DeepSpeed", "lightning.pytorch", "lightning.fabric", "transformers.tokenization_utils_base")


def configure_process(settings: TrainerConfig) -> None:
    """Let the first process log lines and show bars, and the others log errors alone; set the number of threads."""
    allow_bars(None if settings.progress_bar and processes.is_first() else False)
    for logger in map(logging.getLogger, ("recondense", "callbacks")):
        if not logger.handlers:
            logger.addHandler(logging.StreamHandler())
            logger.setLevel(logging.INFO)
            logger.propagate = False  # Hydra's root handler would say everything twice
        if not processes.is_first():
            logger.setLevel(logging.ERROR)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # "loading", "exporting": the run has bars of its own
    # Lightning still asks torch in an old way; nothing that a user could mend.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # a resumed run's is
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", module="lightning")
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
