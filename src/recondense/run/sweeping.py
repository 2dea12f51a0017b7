"""Sweeps: checks of the launchers and sweepers that are plugins of Hydra, and what W&B calls the runs of a sweep."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recondense.config.logger import LoggerConfig, name_in_sweep
from recondense.config.problems import Problem

# Module of a plugin: (the choices that it adds, its package).
PLUGINS = {
    "hydra_joblib_launcher": (("hydra/launcher/joblib",), "hydra-joblib-launcher"),
    "hydra_submitit_launcher": (
        ("hydra/launcher/submitit", "hydra/launcher/submitit_slurm", "hydra/launcher/submitit_local"),
        "hydra-submitit-launcher",
    ),
    "hydra_optuna_sweeper": (("hydra/sweeper/optuna",), "hydra-optuna-sweeper"),
}
DIRECTIONS = ("minimize", "maximize")


def missing_plugin(config: str) -> Problem | None:
    """Return a problem if a config (group/name) is missing because its plugin is not installed, else None."""
    for choices, package in PLUGINS.values():
        if config in choices:
            group, _, name = config.rpartition("/")
            text = f"{package} is not installed. Install it with pip install 'recondense[cluster]'."
            return Problem(group, text, name)
    return None


def find_plugin(target: str) -> str | None:
    """Return the module of the plugin that defines a `_target_`; None if Hydra itself does."""
    return next((name for name in PLUGINS if name in target.split(".")), None)


def runs_side_by_side(launcher: str) -> bool:
    """Return whether a launcher, by its `_target_`, runs jobs in parallel or without a terminal."""
    return find_plugin(launcher) is not None


def named_in_sweep(logger: LoggerConfig, experiment_name: str, folder: Path, run: str) -> LoggerConfig:
    """Return the settings of the loggers of one run of a sweep, which is in the W&B group of the sweep.

    Args:
        logger: the settings of the config.
        experiment_name: the name of the experiment.
        folder: the folder of the sweep.
        run: what tells the run from the others.
    """
    return replace(logger, wandb=name_in_sweep(logger.wandb, os.environ, f"{experiment_name}-{folder.name}", run))


def takes_intervals(hydra: Mapping[str, Any]) -> bool:
    """Return whether the sweeper accepts intervals."""
    return find_plugin(str(hydra["sweeper"].get("_target_"))) == "hydra_optuna_sweeper"


def check_plugins(hydra: Mapping[str, Any], multirun: bool) -> list[Problem]:
    """Return the problems of the launcher and the sweeper.

    Args:
        hydra: settings of Hydra's `launcher` and `sweeper`.
        multirun: whether the command is a sweep.
    """
    problems: list[Problem] = []
    for part in ("launcher", "sweeper"):
        name = find_plugin(str(hydra[part].get("_target_")))
        if name is None:
            continue
        if not _installed(f"hydra_plugins.{name}"):  # conf/hydra/launcher/submitit.yaml exists without the plugin
            problems += filter(None, [missing_plugin(PLUGINS[name][0][0])])
        if not multirun:
            text = f"{PLUGINS[name][1]} is for sweeps, but this command is one run. Add -m."
            problems.append(Problem(f"hydra/{part}", text))
    directions = _directions(hydra)
    wrong = [word for word in directions if word not in DIRECTIONS]
    return problems + [Problem("hydra.sweeper.direction", "must be minimize or maximize.", word) for word in wrong]


def check_metric(hydra: Mapping[str, Any], metric: str | Sequence[str]) -> list[Problem]:
    """Return a problem if the number of Optuna's directions differs from the number of metrics."""
    directions, metrics = _directions(hydra), [metric] if isinstance(metric, str) else list(metric)
    if not directions or len(directions) == len(metrics):
        return []
    text = (
        f"{len(metrics)} metrics, but hydra.sweeper.direction=[{','.join(directions)}]. Set one direction, minimize or "
        "maximize, for each metric."
    )
    return [Problem("metric", text, metrics)]


def _directions(hydra: Mapping[str, Any]) -> list[str]:
    """Return Optuna's directions; an empty list for other sweepers."""
    if not takes_intervals(hydra):
        return []
    directions = hydra["sweeper"].get("direction", "minimize")
    return [str(word) for word in ([directions] if isinstance(directions, str) else directions)]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # no plugin is installed
        return False
