"""The command: composed and checked before Hydra runs it. All that is wrong is reported together, with exit code 2.

Hydra itself stops at the first override that it cannot place. Here the config is composed without that override, and
the rest is checked too. An unknown choice is checked as the choice that it resembles.
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
NAME = "train"  # of the primary config
Overrides = tuple[str, ...]


def command_hash() -> str:
    """Return names a sweep's folder: the same command finds the same folder."""
    arguments = sorted(argument for argument in sys.argv[1:] if argument not in ("-m", "--multirun"))
    return hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:8]


# Cached in the config, which jobs in processes of other commands (joblib's, submitit's) are handed.
OmegaConf.register_new_resolver("command_hash", command_hash, replace=True, use_cache=True)
OmegaConf.register_new_resolver("expand_home", os.path.expanduser, replace=True)
# DeepSpeed warns where there is no GPU. Its import sets its logger's level anew; a filter stays.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def main(folder: Path | None = None) -> None:
    """Check the command, then run it.

    Args:
        folder: where a relative --config-path begins; None: in the current folder.
    """
    first = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0
    with exit_codes(silent=not first):
        args = get_args_parser().parse_args()
        if args.help:
            print(help_page(CONFIGS))
            return
        if args.config_path is not None and "://" not in args.config_path:  # Hydra would begin beside this file
            sys.argv.append(f"--config-path={os.path.abspath(Path(folder or '', args.config_path))}")
            args = get_args_parser().parse_args()
        job = make_job(validate(args))
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=NAME)(job)()


def make_job(runs: Mapping[Overrides, Run]) -> Callable[[DictConfig], Any]:
    """Return the function that Hydra calls for each run; its value is what a sweep compares.

    Args:
        runs: those that are resolved already. A sweeper may choose others, which are read from Hydra's config.
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
    """Run the pipeline, or print sizes alone.

    Args:
        context: the run's `hydra` config.
    """
    if run.config.plan_only:
        from recondense.run.plan_only import plan_only

        return plan_only(run)
    from recondense import callbacks
    from recondense.run import pipeline

    config = run.config
    if sweeping.runs_side_by_side(context.launcher["_target_"]):  # their progress bars would fight for one line
        config = replace(config, trainer=replace(config.trainer, progress_bar=False))
    return pipeline.run(config, run.steps, callbacks.callback_maker(config), child_command(context), run.stages)


def validate(args: Namespace) -> dict[Overrides, Run]:
    """Check a command before anything runs, every run of a sweep included.

    What imports torch is checked last, and only if nothing else is wrong.

    Args:
        args: the command line, parsed by Hydra's own parser.

    Returns:
        the runs, resolved, by the overrides from which Hydra composes each.

    Raises:
        ConfigError: everything that is wrong.
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
    """Return the runs of a command without the steps of their methods; what is wrong with them goes to `problems`.

    Args:
        settings: of Hydra's `launcher` and `sweeper`.
    """
    runs: dict[Overrides, Run] = {}
    for overrides, of_hydra in _jobs(args.overrides, settings, multirun, loader, problems):
        values = compose_run(name, [*of_hydra, *overrides], loader, problems)
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
    """Yield what several runs of one command would do to each other."""
    yield from overwritten_inputs([run.config for run in runs])
    folders: dict[Path, str] = {}
    for config in (run.config for run in runs):
        if folders.setdefault(config.run_folder(), config.run_hash()) != config.run_hash():
            yield Problem("run_dir", "several runs of the sweep would share it. Set run_dir=null.", config.run_dir)


def _with_steps(runs: Mapping[Overrides, Run], multirun: bool) -> dict[Overrides, Run]:
    """Return the runs with the steps of their methods, checked on their models.

    Raises:
        ConfigError: everything that is wrong.
    """
    gc.disable()  # what imports make stays, and looking through it again and again takes a tenth of their time
    try:
        return _check_on_models(runs, multirun)
    finally:
        gc.freeze()
        gc.enable()


def _check_on_models(runs: Mapping[Overrides, Run], multirun: bool) -> dict[Overrides, Run]:
    from recondense.run.model_and_machine_checks import preflight  # it imports torch, and launching Lightning

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
    """Return whether the command is a sweep (an experiment may say so of itself), and its launcher and sweeper."""
    chosen = [text for text in overrides if text.startswith(("experiment=", "hydra.", "hydra/"))]
    nothing: dict[str, Any] = {"launcher": {}, "sweeper": {}}
    if not chosen and not multirun:
        return False, nothing
    try:
        hydra = compose(name, chosen, return_hydra_config=True).hydra
    except COMPOSE_ERRORS as error:
        if problem := sweeping.missing_plugin(str(getattr(error, "missing_cfg_file", ""))):
            raise ConfigError(render([problem])) from None  # nothing of an experiment that needs it can be composed
        return multirun, nothing  # reported where the jobs are composed
    multirun = multirun or str(hydra.mode).endswith("MULTIRUN")
    parts = {part: OmegaConf.to_container(hydra[part], enum_to_str=True) for part in ("launcher", "sweeper")}
    return multirun, cast(dict[str, Any], parts)


def _jobs(
    given: Sequence[str], settings: Mapping[str, Any], multirun: bool, loader: ConfigLoader, problems: list[Problem]
) -> list[tuple[Overrides, list[str]]]:
    """Return the overrides of every run of a command, and those of Hydra itself.

    Any value of an interval may come: its ends stand for all.
    """
    swept = [f"{key}={value}" for key, value in (settings["sweeper"].get("params") or {}).items() if multirun]
    intervals = multirun and sweeping.takes_intervals(settings)
    parser = OverridesParser.create(config_loader=loader)
    parsed: list[Override] = []
    for text in (*swept, *given):
        try:
            override = parser.parse_override(text)
        except (OverrideParseException, HydraException):
            key, _, value = text.partition("=")
            quoted = f"'{key}=\"{value}\"'" if value.startswith("~") else "key='\"a, b\"'"
            remedy = f"is no setting. Write key=value, and quote special characters: {quoted}."
            problems.append(Problem(text, remedy))
            continue
        if intervals and override.is_interval_sweep():
            ends = cast(IntervalSweep, override.value())
            override = parser.parse_override(f"{override.get_key_element()}={ends.start},{ends.end}")
        if override.is_interval_sweep():
            problems.append(Problem(text, "only Optuna chooses from an interval. Add -m hydra/sweeper=optuna."))
            continue
        if override.is_sweep_override() and not multirun:
            key, _, values = text.partition("=")
            hint = "" if key in list_groups(loader) else f", or write a list: '{key}=[{values}]'"
            problems.append(Problem(text, f"several values for one run. Add -m to run each{hint}."))
            continue
        parsed.append(override)
    of_hydra = [str(override.input_line) for override in parsed if override.is_hydra_override()]
    parsed = [override for override in parsed if not override.is_hydra_override()]
    jobs = BasicSweeper.split_arguments(parsed, None)[0] if multirun else [[str(line.input_line) for line in parsed]]
    return [(tuple(job), of_hydra) for job in jobs]


def child_command(context: Any) -> list[str]:
    """Return the command of another process of a run.

    Args:
        context: the run's `hydra` config; of one of a sweep its own.
    """
    # An experiment may be a sweep by its own settings.
    alone = "hydra.mode=RUN", "hydra/sweeper=basic", "hydra/launcher=basic"
    return [sys.executable, "-m", __name__, *same_configs(context), *context.overrides.task, *alone]


if __name__ == "__main__":
    main()
