"""Checks of a run that take no seconds: they import neither torch nor transformers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from recondense.config.checks import check_config
from recondense.config.problems import Problem
from recondense.config.schema import CalibrationConfig, Config, read
from recondense.data.corpora import check_paths
from recondense.run.resolved import Run


def check_quickly(run: Run) -> Iterator[Problem]:
    """Yield problems that the config and the files it names tell, without a model."""
    yield from check_config(run.config, run.stages)
    if not run.config.plan_only:
        yield from _check_packages(run.config)
        yield from _check_texts(run)
        yield from _check_token(run.config)
    yield from check_run_folder(run.config, stored_config(run.config.run_folder()))


def _check_texts(run: Run) -> Iterator[Problem]:
    yield from check_paths(run.config.data)
    for stage in run.stages if run.config.recovery.objective != "none" else ():
        if stage.own_texts:
            data = replace(stage.data, calibration=CalibrationConfig())
            yield from check_paths(data, f"{stage.where}.data")


def _check_packages(config: Config) -> Iterator[Problem]:
    """Yield an engine that is an extra and is not installed."""
    if config.trainer.deepspeed and importlib.util.find_spec("deepspeed") is None:
        text = "DeepSpeed is not installed. pip install 'recondense[deepspeed]' brings it."
        yield Problem("trainer.strategy", text, config.trainer.strategy)


def _check_token(config: Config) -> Iterator[Problem]:
    """Yield an upload that nobody is logged in for."""
    if config.export.push_to_hub is None or config.export.enabled is False:
        return
    from huggingface_hub import get_token  # late: few commands need it

    if get_token() is None:
        text = "there is no token for the hub; run `hf auth login`, or set HF_TOKEN."
        yield Problem("export.push_to_hub", text, config.export.push_to_hub)


def check_run_folder(config: Config, stored: Config | None) -> Iterator[Problem]:
    """Yield problems of the run's folder.

    Args:
        stored: the config that the folder holds, None without any.
    """
    folder = config.run_folder()
    if folder.is_file():
        yield Problem("run_dir", "is a file; a folder is needed.", folder)
    elif stored is not None:
        if not config.overwrite and stored.run_hash() != config.run_hash():
            names = differences(stored.identity(), config.identity())
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            text = (
                f"the folder holds a run with another config (different: {shown}). Choose another run_dir, or "
                "overwrite=true to start anew there."
            )
            yield Problem("run_dir", text, folder)
    elif folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        text = "the folder is not empty and holds no run of recondense. Choose another run_dir."
        yield Problem("run_dir", text, folder)
    else:
        parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            text = f"{parent} cannot be written to. Choose another output_dir or run_dir."
            yield Problem("run_dir", text, folder)


def stored_config(folder: Path) -> Config | None:
    """Return the config that a run's folder holds; None if what it holds is not recondense's."""
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(values, dict) or not values.keys() >= {"model", "method", "recovery"}:
        return None
    config, problems = read(values)
    return None if problems else config


def differences(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> list[str]:
    """Return dotted names of the settings in which two resolved configs differ."""
    names = []
    for key in [*one, *(key for key in other if key not in one)]:
        mine, theirs = one.get(key), other.get(key)
        where = f"{path}.{key}" if path else str(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            names += differences(mine, theirs, where)
        elif mine != theirs:
            names.append(where)
    return names
