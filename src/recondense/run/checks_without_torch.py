"""Fast checks of a run, which import neither torch nor transformers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace

from recondense.config.checks import check_config
from recondense.config.logger import check_variables
from recondense.config.problems import Problem
from recondense.config.schema import CalibrationConfig, Config
from recondense.data.corpora import check_paths
from recondense.run.default_budget import is_settled
from recondense.run.folder_checks import check_cache, check_run_folder, stored_run
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
    if is_settled(run.config):  # otherwise the folder's name may change
        yield from check_run_folder(run.config, stored_run(run.config.run_folder()), run.overrides)
    if not run.config.plan_only:
        yield from check_cache(run.config)


def is_done(config: Config) -> bool:
    """Return whether the run of exactly this config has been done, and is not to be started over."""
    if not has_summary(config):
        return False
    stored = stored_run(config.run_folder())
    return isinstance(stored, Config) and stored.run_hash() == config.run_hash()


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
