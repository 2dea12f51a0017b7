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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

from recondense.config.problems import Problem, render
from recondense.config.schema import read
from recondense.config.stages import resolve_stages
from recondense.errors import ConfigError, require_checks
from recondense.run import sweeping
from recondense.run.build_steps import build_steps
from recondense.run.checks_without_torch import check_quickly, is_done
from recondense.run.command_options import check_options, options_first
from recondense.run.default_budget import is_settled
from recondense.run.done_runs import as_done
from recondense.run.environment import forget_other_programs, naming_variables
from recondense.run.exit_codes import another_says_it, exit_codes
from recondense.run.folder_checks import check_run_folder, stored_run
from recondense.run.help_page import help_page
from recondense.run.jobs import Overrides, read_sweep, resolve_job, split_jobs
from recondense.run.lost_output import survive_lost_output
from recondense.run.resolved_run import Run
from recondense.run.run_folder import overwritten_inputs, owners
from recondense.run.search_path import CONFIGS, as_written, initialize_hydra, same_configs
from recondense.run.unknown_overrides import compose_run, place_with_family, resolve_values

NO_CONFIG = ("hydra_help", "shell_completion", "experimental_rerun")
NAME = "train"  # name of the primary config


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
        folder: folder of the script that calls this, to which a relative --config-path refers; None for the command
            `recondense`.
    """
    forget_other_programs()
    with survive_lost_output(), exit_codes(silent=another_says_it()):
        sys.argv[1:] = options_first(sys.argv[1:], get_args_parser())
        args = get_args_parser().parse_args()
        if args.help:
            print(help_page(CONFIGS, "recondense" if folder is None else f"python {Path(sys.argv[0]).name}"))
            return
        require_checks()
        # Hydra resolves a relative path from the folder of this file.
        if args.config_path is not None and "://" not in args.config_path:
            sys.argv.append(f"--config-path={os.path.abspath(Path(folder or '', args.config_path))}")
            args = get_args_parser().parse_args()
        runs = validate(args)
        if (run := _only_sizes(args, runs)) is not None:
            start(run, None)
            return
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=NAME)(make_job(runs))()


def _only_sizes(args: Namespace, runs: Mapping[Overrides, Run]) -> Run | None:
    """Return the run of a command that prints sizes once, for which Hydra need not compose a second time."""
    hydra_overrides = [text for text in args.overrides if text.lstrip("+~").startswith(("hydra", "experiment"))]
    own_configs = args.config_name or args.config_path or args.config_dir
    if len(runs) != 1 or args.multirun or hydra_overrides or own_configs:  # those may make it a sweep, or log otherwise
        return None
    [run] = runs.values()
    return run if run.config.plan_only else None


def make_job(runs: Mapping[Overrides, Run]) -> Callable[[DictConfig], Any]:
    """Return the function that Hydra calls for each run. It returns the metric that a sweep compares.

    Args:
        runs: runs that are already resolved. Others, which a sweeper may choose, are resolved from their overrides.
    """

    def job(settings: DictConfig) -> Any:
        context = HydraConfig.get()
        with exit_codes(sweep=context.mode is RunMode.MULTIRUN):
            run = runs.get(as_written(context.overrides.task)) or resolve_job(context)
            with flag_override(settings, ["struct", "readonly"], False):  # the comparison of a sweep reads them
                settings.update(run.config.resolved())
            return start(run, context)

    return job


def start(run: Run, context: Any) -> Any:
    """Run the pipeline, or with `plan_only` print sizes. First, say which settings come from the model.

    Args:
        run: the resolved run.
        context: the run's `hydra` config; None with `plan_only`.

    Returns:
        the metric that a sweep compares; None with `plan_only`.
    """
    from recondense import processes  # late: imports torch
    from recondense.run.reachable_budget import lines

    for line in lines(run.config) if processes.is_first_to_start() else ():
        print(line, flush=True)
    if run.config.plan_only:
        from recondense.run.print_sizes import print_sizes

        return print_sizes(run)
    from recondense import callbacks
    from recondense.run import pipeline

    config = run.config
    if context.mode is RunMode.MULTIRUN:
        names = config.experiment_name, Path(context.sweep.dir), config.run_hash()
        config = replace(config, logger=sweeping.named_in_sweep(config.logger, *names))
    if sweeping.runs_side_by_side(context.launcher["_target_"]):  # their progress bars would overwrite each other
        config = replace(config, trainer=replace(config.trainer, progress_bar=False))
    return pipeline.run(config, run.steps, callbacks.callback_maker(config), child_command(context), run.stages)


def validate(args: Namespace) -> dict[Overrides, Run]:
    """Check a command before anything runs, including every run of a sweep.

    Checks that import torch come last, and run only if all names are known and all values have the right type.

    Args:
        args: the command line, parsed by Hydra's parser.

    Returns:
        the resolved runs, by the overrides from which Hydra composes them.

    Raises:
        ConfigError: the command has problems; the error lists all of them.
    """
    check_options(args)
    if any(getattr(args, option) for option in NO_CONFIG):
        return {}
    problems: list[Problem] = []
    name = args.config_name or NAME
    with initialize_hydra(name, args) as loader:
        if args.cfg or args.info:
            shown = _check_names(name, args, loader)
            sys.argv[1:] = options_first([*sys.argv[1:], *shown], get_args_parser())
            return {}
        multirun, settings = read_sweep(name, args.overrides, args.multirun)
        problems += sweeping.check_plugins(settings, multirun)
        checked = _check_runs(name, args, settings, multirun, loader, problems)
    if not all(problem.of_value for problem in problems):
        raise ConfigError(render(problems))
    return _with_steps(checked, multirun, problems)


def _check_names(name: str, args: Namespace, loader: ConfigLoader) -> list[str]:
    """Check what --cfg and --info show, which may have values that are missing or wrong.

    Returns:
        the choice of `model=` that the path of the model decides, for Hydra, which shows one run.

    Raises:
        ConfigError: overrides that cannot be placed; with --resolve also interpolations that cannot be resolved.
    """
    problems: list[Problem] = []
    choice: list[str] = []
    for overrides, hydra_overrides in split_jobs(args.overrides, {"sweeper": {}}, False, loader, problems):
        config, choice = place_with_family(name, [*hydra_overrides, *overrides], loader, problems)
        if config is not None and args.resolve:
            resolve_values(config, problems)
    if problems:
        raise ConfigError(render(problems))
    return choice


@dataclass(frozen=True)
class _Checked:
    """A run without the steps of its method.

    Args:
        wrong: names of its settings with a problem; `run` has defaults in their place, or values that cannot be used.
    """

    run: Run
    wrong: frozenset[str]


def _check_runs(
    name: str,
    args: Namespace,
    settings: Mapping[str, Any],
    multirun: bool,
    loader: ConfigLoader,
    problems: list[Problem],
) -> dict[Overrides, _Checked]:
    """Return the runs of a command, checked without torch, and append their problems to `problems`.

    Args:
        name: name of the primary config.
        args: the command line.
        settings: settings of Hydra's `launcher` and `sweeper`.
        multirun: whether the command is a sweep.
        loader: Hydra's loader of configs.
        problems: list to which problems are appended.
    """
    checked: dict[Overrides, _Checked] = {}
    jobs = split_jobs(args.overrides, settings, multirun, loader, problems)
    unread = {problem.setting.partition("=")[0] for problem in problems}  # nothing more is said of them
    for overrides, hydra_overrides in jobs:
        run_problems: list[Problem] = []  # another run may have another value of the same setting
        values = compose_run(name, [*hydra_overrides, *overrides], loader, run_problems)
        run_problems = [problem for problem in run_problems if problem.setting.partition("=")[0] not in unread]
        if values is None:
            problems += run_problems
            continue
        config, mistakes = read(values)
        config = as_done(config)
        stages, wrong_stages = resolve_stages(config)
        run = Run(config, stages, overrides=overrides)
        of_values = (replace(problem, of_value=True) for problem in check_quickly(run))
        for more in (mistakes, wrong_stages, of_values):
            wrong = unread | {problem.setting for problem in run_problems}
            run_problems += [problem for problem in more if problem.setting not in wrong]
        if multirun:
            run_problems += (
                replace(problem, of_value=True) for problem in sweeping.check_metric(settings, config.metric)
            )
        problems += run_problems
        checked[overrides] = _Checked(run, frozenset(problem.setting for problem in run_problems))
    runs = [item.run for item in checked.values()]
    if all(is_settled(run.config) for run in runs):
        problems += (replace(problem, of_value=True) for problem in _check_together(runs))
    return checked


def _check_together(runs: Sequence[Run]) -> Iterator[Problem]:
    """Yield conflicts between the runs of one command."""
    yield from overwritten_inputs(runs)
    folders: dict[Path, str] = {}
    for config in (run.config for run in runs):
        if folders.setdefault(config.run_folder(), config.run_hash()) != config.run_hash():
            yield Problem(
                "run_dir", "several runs of the sweep would use this folder. Set run_dir=null.", config.run_dir
            )
    places = {os.path.realpath(folder): folder for folder in folders}
    for config in (run.config for run in runs if run.config.run_dir):
        around = map(os.path.realpath, owners(config.run_folder()))
        if (outer := next((places[place] for place in around if place in places), None)) is not None:
            text = f"the folder is among the results of another run of the sweep, {outer}. Choose another run_dir."
            yield Problem("run_dir", text, config.run_dir)


def _with_steps(
    checked: Mapping[Overrides, _Checked], multirun: bool, problems: Sequence[Problem]
) -> dict[Overrides, Run]:
    """Return the runs with the steps of their methods, after the checks that need their models.

    Args:
        problems: what is wrong already.

    Raises:
        ConfigError: the runs have problems; the error lists all of them.
    """
    gc.disable()  # scanning the objects of imported modules, which stay alive, takes a tenth of the import time
    try:
        return _check_on_models(checked, multirun, problems)
    finally:
        gc.freeze()
        gc.enable()


def _check_on_models(
    checked: Mapping[Overrides, _Checked], multirun: bool, problems: Sequence[Problem]
) -> dict[Overrides, Run]:
    with naming_variables():
        from recondense.run.model_and_machine_checks import preflight  # late: imports torch
        from recondense.run.reachable_budget import reachable

    messages = render(problems)
    if multirun and not all(item.run.config.plan_only for item in checked.values()):
        from recondense.run.launching import check_sweep

        messages += render(check_sweep())
    complete: dict[Overrides, Run] = {}
    for overrides, item in checked.items():
        run, wrong = item.run, item.wrong
        groups = {setting.partition(".")[0] for setting in wrong}
        if "method" not in groups:
            try:
                steps = build_steps(run.config.method)
                config = run.config if "model" in groups or is_done(run.config) else reachable(run.config)
                run = replace(run, config=config, steps=steps if config is run.config else build_steps(config.method))
            except ConfigError as error:
                messages += error.messages
                wrong = wrong | {"method"}
        if not is_done(run.config):  # else what it read may be gone
            messages += render(preflight(run, wrong))
        complete[overrides] = run
    if unsettled := [run for run in complete.values() if not is_settled(run.config)]:
        for run in unsettled:
            messages += render(check_run_folder(run.config, stored_run(run.config.run_folder()), run.overrides))
        messages += render(_check_together(list(complete.values())))
    if messages:
        raise ConfigError(dict.fromkeys(messages))
    return complete


def child_command(context: Any) -> list[str]:
    """Return the command that starts a further process of a run.

    Args:
        context: the run's `hydra` config; for a run of a sweep, the config of this run.
    """
    # An experiment can make the command a sweep; these overrides make it a single run.
    # -P: the process imports from the folders of this one, and not from the current folder first.
    single_run = "hydra.mode=RUN", "hydra/sweeper=basic", "hydra/launcher=basic"
    words = [*same_configs(context), *as_written(context.overrides.task)]
    return [sys.executable, "-P", "-m", __name__, *words, *single_run]


if __name__ == "__main__":
    main()
