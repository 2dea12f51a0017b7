"""What runs a sweep beside Hydra's own launcher and sweeper: whether it is installed, and whether its settings fit."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from recondense.config.problems import Problem

# Module of a plugin: the choices that it brings, and the package that brings it.
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
    """Return why a config (group/name) is not there, if that is because its plugin is not installed."""
    for choices, package in PLUGINS.values():
        if config in choices:
            group, _, name = config.rpartition("/")
            text = f"{package} is not installed. pip install 'recondense[cluster]' brings it."
            return Problem(group, text, name)
    return None


def find_plugin(target: str) -> str | None:
    """Which of the plugins a `_target_` is of; None: Hydra's own."""
    return next((name for name in PLUGINS if name in target.split(".")), None)


def runs_side_by_side(launcher: str) -> bool:
    """Return whether a launcher (its `_target_`) starts the runs of a sweep at the same time, or where nobody looks on."""
    return find_plugin(launcher) is not None


def takes_intervals(hydra: Mapping[str, Any]) -> bool:
    """Return whether the sweeper chooses values between two ends."""
    return find_plugin(str(hydra["sweeper"].get("_target_"))) == "hydra_optuna_sweeper"


def check_plugins(hydra: Mapping[str, Any], multirun: bool) -> list[Problem]:
    """Return problems of the launcher and the sweeper.

    Args:
        hydra: `launcher` and `sweeper`, the settings of each.
        multirun: whether the command is a sweep.
    """
    problems: list[Problem] = []
    for part in ("launcher", "sweeper"):
        name = find_plugin(str(hydra[part].get("_target_")))
        if name is None:
            continue
        if not _installed(f"hydra_plugins.{name}"):  # conf/hydra/launcher/submitit.yaml is ours
            problems += filter(None, [missing_plugin(PLUGINS[name][0][0])])
        if not multirun:
            text = f"{PLUGINS[name][1]} is for sweeps, and this command is one run. Add -m."
            problems.append(Problem(f"hydra/{part}", text))
    directions = _directions(hydra)
    wrong = [word for word in directions if word not in DIRECTIONS]
    return problems + [Problem("hydra.sweeper.direction", "must be minimize or maximize.", word) for word in wrong]


def check_metric(hydra: Mapping[str, Any], metric: str | Sequence[str]) -> list[Problem]:
    """That Optuna is told a direction for each metric that a run returns."""
    directions, metrics = _directions(hydra), [metric] if isinstance(metric, str) else list(metric)
    if not directions or len(directions) == len(metrics):
        return []
    text = (
        f"{len(metrics)} for hydra.sweeper.direction=[{','.join(directions)}]. Give one direction, minimize or "
        "maximize, for each metric."
    )
    return [Problem("metric", text, metrics)]


def _directions(hydra: Mapping[str, Any]) -> list[str]:
    """Of Optuna; none of other sweepers."""
    if not takes_intervals(hydra):
        return []
    given = hydra["sweeper"].get("direction", "minimize")
    return [str(word) for word in ([given] if isinstance(given, str) else given)]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # there is no plugin at all
        return False
