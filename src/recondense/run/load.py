"""Loading of the model that a run starts from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

from lightning.pytorch.callbacks import Callback
from transformers import PreTrainedModel

from recondense import processes
from recondense.calibration.calibrate import Timed
from recondense.config.schema import WORK, Config
from recondense.models import loading
from recondense.run import tiny


class MakeCallbacks(Protocol):
    """A function that returns the Lightning callbacks of a fit.

    Args:
        stage: name of the fit: pretrain, recovery, control, <recovery stage>, or control/<recovery stage>.
        tasks: names of the run's lm-eval tasks.
        include_path: folders with task files.
        timed: context manager that counts the seconds of a part of the run, for callbacks that evaluate.
    """

    def __call__(
        self, stage: str, tasks: Sequence[str], include_path: Sequence[Path], timed: Timed = ...
    ) -> Sequence[Callback]: ...


def no_callbacks(
    stage: str, tasks: Sequence[str], include_path: Sequence[Path], timed: Timed | None = None
) -> Sequence[Callback]:
    """Return no callbacks."""
    return ()


def locate(config: Config, callbacks: MakeCallbacks = no_callbacks) -> str | Path:
    """Return the hub id or folder of a config's model. The embedded model is trained if the cache does not have it."""
    return config.model.path or processes.run_on_first(lambda: _train_embedded(config, callbacks))


def load_model(config: Config, path: str | Path) -> PreTrainedModel:
    """Return the model of a config.

    Args:
        config: settings of the run.
        path: what `locate` returned.
    """
    settings = config.model
    pages = config.run_folder() / WORK / f"layers-{processes.rank()}" if settings.streaming else None
    with processes.let_first_go_ahead() if settings.path else nullcontext():  # it downloads the model
        return loading.load_model(path, settings, pages)


def _train_embedded(config: Config, callbacks: MakeCallbacks) -> Path:
    with processes.work_alone():  # its training must not depend on the number of processes
        return tiny.ensure(config.model, Path(config.cache_dir), config.trainer, callbacks("pretrain", (), ()))
