"""The command. Its config is composed and checked before Hydra runs it; all problems are reported with exit code 2.

Hydra stops at the first override that it cannot apply. This module leaves that override out and checks the rest as
well. If the choice of a group is unknown, it checks the most similar choice.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import hydra
from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from recondense.config.problems import Problem, render
from recondense.config.schema import read
from recondense.config.stages import resolve_stages
from recondense.errors import ConfigError
from recondense.run import sweeping
from recondense.run.build_steps import build_steps
from recondense.run.checks_without_torch import check_quickly
from recondense.run.exit_codes import exit_codes
from recondense.run.help_page import help_page
from recondense.run.overrides import COMPOSE_ERRORS, compose_run, list_groups
from recondense.run.resolved import Run, resolve
from recondense.run.run_folder import overwritten_inputs
from recondense.run.search_path import CONFIGS, initialize_hydra, same_configs

NO_RUN = ("hydra_help", "cfg", "info", "shell_completion", "experimental_rerun")
NAME = "train"  # name of the primary config
Overrides = tuple[str, ...]


def command_hash() -> str:
    """Return a hash of the command, which names a sweep's folder: the same command uses the same folder again."""
    arguments = sorted(argument for argument in sys.argv[1:] if argument not in ("-m", "--multirun"))
    return hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:8]


# The config caches the hash, because jobs of joblib and submitit run in processes with another command.
OmegaConf.register_new_resolver("command_hash", command_hash, replace=True, use_cache=True)
OmegaConf.register_new_resolver("expand_home", os.path.expanduser, replace=True)
# DeepSpeed warns if there is no GPU. Its import resets its logger's level, but keeps filters.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def main(folder: Path | None = None) -> None:
    """Check the command, then run it.

    Args:
        folder: folder to which a relative --config-path refers; None for the current folder.
    """
    first = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0
    with exit_codes(silent=not first):
        args = get_args_parser().parse_args()
        if args.help:
            print(help_page(CONFIGS))
            return
        # Hydra resolves a relative path from the folder of this file.
        if args.config_path is not None and "://" not in args.config_path:
            sys.argv.append(f"--config-path={os.path.abspath(Path(folder or '', args.config_path))}")
            args = get_args_parser().parse_args()
        job = make_job(validate(args))
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=NAME)(job)()


def make_job(runs: Mapping[Overrides, Run]) -> Callable[[DictConfig], Any]:
    """Return the function that Hydra calls for each run. It returns the metric that a sweep compares.

    Args:
        runs: runs that are already resolved. Others, which a sweeper may choose, are resolved from Hydra's config.
    """

    def job(settings: DictConfig) -> Any:
        context = HydraConfig.get()
        with exit_codes(sweep=context.mode is RunMode.MULTIRUN):
            run = runs.get(tuple(context.overrides.task)) or resolve(
                cast(dict[str, Any], OmegaConf.to_container(settings, resolve=True))
            )
            return start(run, context)

    return job


def start(run: Run, context: Any) -> Any:
    """Run the pipeline, or with `plan_only` print sizes.

    Args:
        run: the resolved run.
        context: the run's `hydra` config.

    Returns:
        the metric that a sweep compares; None with `plan_only`.
    """
    if run.config.plan_only:
        from recondense.run.plan_only import plan_only

        return plan_only(run)
    from recondense import callbacks
    from recondense.run import pipeline

    config = run.config
    if sweeping.runs_side_by_side(context.launcher["_target_"]):  # their progress bars would overwrite each other
        config = replace(config, trainer=replace(config.trainer, progress_bar=False))
    return pipeline.run(config, run.steps, callbacks.callback_maker(config), child_command(context), run.stages)


def validate(args: Namespace) -> dict[Overrides, Run]:
    """Check a command before anything runs, including every run of a sweep.

    Checks that import torch come last and run only if no other check finds a problem.

    Args:
        args: the command line, parsed by Hydra's parser.

    Returns:
        the resolved runs, by the overrides from which Hydra composes them.

    Raises:
        ConfigError: the command has problems; the error lists all of them.
    """
    if any(getattr(args, option) for option in NO_RUN):
        return {}
    problems: list[Problem] = []
    name = args.config_name or NAME
    with initialize_hydra(name, args) as loader:
        multirun, settings = _hydra(name, args.overrides, args.multirun)
        problems += sweeping.check_plugins(settings, multirun)
        runs = _runs(name, args, settings, multirun, loader, problems)
    if problems:
        raise ConfigError(render(problems))
    return _with_steps(runs, multirun)


def _runs(
    name: str,
    args: Namespace,
    settings: Mapping[str, Any],
    multirun: bool,
    loader: ConfigLoader,
    problems: list[Problem],
) -> dict[Overrides, Run]:
    """Return the runs of a command, without the steps of their methods, and append their problems to `problems`.

    Args:
        name: name of the primary config.
        args: the command line.
        settings: settings of Hydra's `launcher` and `sweeper`.
        multirun: whether the command is a sweep.
        loader: Hydra's loader of configs.
        problems: list to which problems are appended.
    """
    runs: dict[Overrides, Run] = {}
    for overrides, hydra_overrides in _jobs(args.overrides, settings, multirun, loader, problems):
        values = compose_run(name, [*hydra_overrides, *overrides], loader, problems)
        if values is None:
            continue
        config, mistakes = read(values)
        stages, wrong_stages = resolve_stages(config)
        run = Run(config, stages)
        problems += [*mistakes, *wrong_stages]
        places = {problem.setting for problem in problems}
        problems += (problem for problem in check_quickly(run) if problem.setting not in places)
        if multirun:
            problems += sweeping.check_metric(settings, config.metric)
        runs[overrides] = run
    problems += _check_together(list(runs.values()))
    return runs


def _check_together(runs: Sequence[Run]) -> Iterator[Problem]:
    """Yield conflicts between the runs of one command."""
    yield from overwritten_inputs([run.config for run in runs])
    folders: dict[Path, str] = {}
    for config in (run.config for run in runs):
        if folders.setdefault(config.run_folder(), config.run_hash()) != config.run_hash():
            yield Problem(
                "run_dir", "several runs of the sweep would use this folder. Set run_dir=null.", config.run_dir
            )


def _with_steps(runs: Mapping[Overrides, Run], multirun: bool) -> dict[Overrides, Run]:
    """Return the runs with the steps of their methods, after the checks that need their models.

    Raises:
        ConfigError: the runs have problems; the error lists all of them.
    """
    gc.disable()  # scanning the objects of imported modules, which stay alive, takes a tenth of the import time
    try:
        return _check_on_models(runs, multirun)
    finally:
        gc.freeze()
        gc.enable()


def _check_on_models(runs: Mapping[Overrides, Run], multirun: bool) -> dict[Overrides, Run]:
    from recondense.run.model_and_machine_checks import (
        preflight,
    )  # late: imports torch, and `launching` imports Lightning

    messages: list[str] = []
    if multirun and not all(run.config.plan_only for run in runs.values()):
        from recondense.run.launching import check_sweep

        messages += render(check_sweep())
    complete: dict[Overrides, Run] = {}
    for overrides, run in runs.items():
        try:
            complete[overrides] = replace(run, steps=build_steps(run.config.method))
        except ConfigError as error:
            messages += error.messages
            continue
        messages += render(preflight(complete[overrides]))
    if messages:
        raise ConfigError(dict.fromkeys(messages))
    return complete


def _hydra(name: str, overrides: Sequence[str], multirun: bool) -> tuple[bool, dict[str, Any]]:
    """Return whether the command is a sweep, which an experiment can set, and the settings of launcher and sweeper."""
    relevant = [text for text in overrides if text.startswith(("experiment=", "hydra.", "hydra/"))]
    empty: dict[str, Any] = {"launcher": {}, "sweeper": {}}
    if not relevant and not multirun:
        return False, empty
    try:
        hydra = compose(name, relevant, return_hydra_config=True).hydra
    except COMPOSE_ERRORS as error:
        if problem := sweeping.missing_plugin(str(getattr(error, "missing_cfg_file", ""))):
            raise ConfigError(render([problem])) from None  # without the plugin, the config cannot be composed
        return multirun, empty  # `compose_run` reports the error
    multirun = multirun or str(hydra.mode).endswith("MULTIRUN")
    parts = {part: OmegaConf.to_container(hydra[part], enum_to_str=True) for part in ("launcher", "sweeper")}
    return multirun, cast(dict[str, Any], parts)


def _jobs(
    overrides: Sequence[str], settings: Mapping[str, Any], multirun: bool, loader: ConfigLoader, problems: list[Problem]
) -> list[tuple[Overrides, list[str]]]:
    """Return for each run of a command its overrides, and the overrides of Hydra's own settings.

    Of an interval, only the two ends are checked, because the sweeper can choose any value between them.
    """
    swept = [f"{key}={value}" for key, value in (settings["sweeper"].get("params") or {}).items() if multirun]
    intervals = multirun and sweeping.takes_intervals(settings)
    parser = OverridesParser.create(config_loader=loader)
    parsed: list[Override] = []
    for text in (*swept, *overrides):
        try:
            override = parser.parse_override(text)
        except (OverrideParseException, HydraException):
            key, _, value = text.partition("=")
            quoted = f"'{key}=\"{value}\"'" if value.startswith("~") else "key='\"a, b\"'"
            remedy = f"is not a setting. Write key=value, and quote special characters: {quoted}."
            problems.append(Problem(text, remedy))
            continue
        if intervals and override.is_interval_sweep():
            ends = cast(IntervalSweep, override.value())
            override = parser.parse_override(f"{override.get_key_element()}={ends.start},{ends.end}")
        if override.is_interval_sweep():
            problems.append(Problem(text, "only Optuna can sweep an interval. Add -m hydra/sweeper=optuna."))
            continue
        if override.is_sweep_override() and not multirun:
            key, _, values = text.partition("=")
            hint = "" if key in list_groups(loader) else f", or write a list: '{key}=[{values}]'"
            problems.append(Problem(text, f"one run cannot have several values. Add -m to run each{hint}."))
            continue
        parsed.append(override)
    hydra_overrides = [str(override.input_line) for override in parsed if override.is_hydra_override()]
    parsed = [override for override in parsed if not override.is_hydra_override()]
    jobs = BasicSweeper.split_arguments(parsed, None)[0] if multirun else [[str(line.input_line) for line in parsed]]
    return [(tuple(job), hydra_overrides) for job in jobs]


def child_command(context: Any) -> list[str]:
    """Return the command that starts a further process of a run.

    Args:
        context: the run's `hydra` config; for a run of a sweep, the config of this run.
    """
    # An experiment can make the command a sweep; these overrides make it a single run.
    single_run = "hydra.mode=RUN", "hydra/sweeper=basic", "hydra/launcher=basic"
    return [sys.executable, "-m", __name__, *same_configs(context), *context.overrides.task, *single_run]


if __name__ == "__main__":
    main()
