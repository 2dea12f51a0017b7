"""Fast checks of a run, which import neither torch nor transformers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from recondense.config.checks import check_config
from recondense.config.logger import check_variables
from recondense.config.problems import Problem
from recondense.config.schema import CalibrationConfig, Config, read
from recondense.data.corpora import check_paths
from recondense.run.resolved_run import Run
from recondense.run.run_folder import has_summary


def check_quickly(run: Run) -> Iterator[Problem]:
    """Yield the problems that show in the config and in the files it names, without a model."""
    if is_done(run.config):  # what it read may be gone
        yield from _check_token(run.config)
        return
    yield from check_config(run.config, run.stages)
    if not run.config.plan_only:
        yield from _check_packages(run.config)
        yield from _check_texts(run)
        yield from _check_token(run.config)
        yield from check_variables(run.config.logger.wandb, os.environ)
    yield from check_run_folder(run.config, stored_config(run.config.run_folder()))


def is_done(config: Config) -> bool:
    """Return whether the run of exactly this config has been done, and is not to be started over."""
    if not has_summary(config):
        return False
    stored = stored_config(config.run_folder())
    return stored is not None and stored.run_hash() == config.run_hash()


def _check_texts(run: Run) -> Iterator[Problem]:
    yield from check_paths(run.config.data)
    for stage in run.stages if run.config.recovery.objective != "none" else ():
        if stage.own_texts:
            data = replace(stage.data, calibration=CalibrationConfig())
            yield from check_paths(data, f"{stage.where}.data")


def _check_packages(config: Config) -> Iterator[Problem]:
    """Yield a problem if the engine needs a package that is not installed."""
    if config.trainer.deepspeed and importlib.util.find_spec("deepspeed") is None:
        text = "DeepSpeed is not installed. Install it with pip install 'recondense[deepspeed]'."
        yield Problem("trainer.strategy", text, config.trainer.strategy)


def _check_token(config: Config) -> Iterator[Problem]:
    """Yield a problem if an upload is requested but there is no token for the hub."""
    if config.export.push_to_hub is None or config.export.enabled is False:
        return
    from huggingface_hub import get_token  # late, because few commands need it

    if get_token() is None:
        text = "there is no token for the hub; run `hf auth login`, or set HF_TOKEN."
        yield Problem("export.push_to_hub", text, config.export.push_to_hub)


def check_run_folder(config: Config, stored: Config | None) -> Iterator[Problem]:
    """Yield the problems of the run's folder.

    Args:
        config: settings of the run.
        stored: config of an earlier run in the folder; None if there is none.
    """
    folder = config.run_folder()
    if folder.is_file():
        yield Problem("run_dir", "is a file; a folder is needed.", folder)
    elif stored is not None:
        if not config.overwrite and stored.run_hash() != config.run_hash():
            names = differences(stored.identity(), config.identity())
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            text = (
                f"the folder contains a run with another config (different: {shown}). Choose another run_dir, or set "
                "overwrite=true to replace that run."
            )
            yield Problem("run_dir", text, folder)
    elif folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        text = "the folder is not empty and contains no run of recondense. Choose another run_dir."
        yield Problem("run_dir", text, folder)
    else:
        parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            text = f"{parent} is not writable. Choose another output_dir or run_dir."
            yield Problem("run_dir", text, folder)


def stored_config(folder: Path) -> Config | None:
    """Return the config stored in a run's folder; None if there is no valid config of recondense."""
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(values, dict) or not values.keys() >= {"model", "method", "recovery"}:
        return None
    config, problems = read(values)
    return None if problems else config


def differences(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> list[str]:
    """Return the dotted names of the settings in which two resolved configs differ.

    Args:
        one, other: the configs, as plain containers.
        path: dotted name of the section that they are.
    """
    names = []
    for key in [*one, *(key for key in other if key not in one)]:
        value, other_value = one.get(key), other.get(key)
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and isinstance(other_value, Mapping):
            names += differences(value, other_value, where)
        elif value != other_value:
            names.append(where)
    return names
