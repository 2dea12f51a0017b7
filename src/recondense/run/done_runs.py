"""Runs that are done, recognized although their model is gone: their config.yaml has what was taken from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from recondense.config.schema import Config
from recondense.models.config_json import config_values
from recondense.run.default_budget import is_settled
from recondense.run.folder_checks import OtherVersion, stored_run
from recondense.run.run_folder import CONFIG, SUMMARY, has_summary


def family_of_done(path: str, experiment: Path, run_dir: str | None) -> str | None:
    """Return the choice of `model=` that the path of a model decided for a run that is done; None without such a run.

    Args:
        path: path of the model.
        experiment: the folder of the experiment's runs.
        run_dir: folder of the run, if the command names one.
    """
    for stored in _done_runs(experiment, run_dir):
        if stored.model.path == os.path.expanduser(path) and stored.model.budgets.get("by_path"):
            return stored.model.name
    return None


def as_done(config: Config) -> Config:
    """Return the config with the defaults that a run which is done used, if it is else the same run.

    Without its model, what the method can reach on it is not known. Then the run may have another folder of the same
    experiment, because a default budget within reach is a part of the hash.
    """
    if is_settled(config) or config.plan_only or config.overwrite:
        return config
    if has_summary(config):
        candidates = [stored_run(config.run_folder())]
    elif config_values(str(config.model.path), config.model.revision) is None:
        candidates = [*_done_runs(Path(config.output_dir, config.experiment_name), config.run_dir)]
    else:
        return config
    return next((again for stored in candidates if (again := _with_defaults_of(stored, config)) is not None), config)


def _with_defaults_of(stored: Config | OtherVersion | None, config: Config) -> Config | None:
    """Return a config with the defaults that a stored run used; None if they are not all in which the two differ."""
    if not isinstance(stored, Config):
        return None
    kept, asked = stored.model.budgets, config.model.budgets
    same = kept.get("of_shape") or kept.get("asked", kept.get("used")) == asked["used"]
    if not same or kept.get("open") != asked["open"]:
        return None
    defaults = {name: stored.method[name] for name in asked["open"] if name in stored.method}
    model = replace(config.model, budgets=kept)
    again = replace(config, method={**config.method, **defaults}, model=model)
    return again if again.run_hash() == stored.run_hash() else None


def _done_runs(experiment: Path, run_dir: str | None) -> Iterator[Config]:
    """Yield the configs of runs that are done, the latest first."""
    folders = [Path(run_dir).expanduser()] if run_dir else [path.parent for path in experiment.glob(f"*/{SUMMARY}")]
    times = {folder: _time(folder / SUMMARY) for folder in folders}
    for folder in sorted(folders, key=lambda folder: (-times[folder], folder)):
        stored = _read(folder, _time(folder / CONFIG)) if times[folder] else None
        if isinstance(stored, Config):
            yield stored


def _time(path: Path) -> int:
    """Return when a file was last changed; 0 if it is missing."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@cache
def _read(folder: Path, _time: int) -> Config | OtherVersion | None:
    return stored_run(folder)
