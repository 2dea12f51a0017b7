"""A command line, composed and checked before Hydra runs it: what is wrong is reported together, with exit code 2.

Hydra itself stops at the first override that it cannot place. Here the config is composed without it, so that the rest
is checked as well; an unknown choice is checked as the choice that it resembles.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from recondense.config.schema import Config, read
from recondense.errors import ConfigError, UserError
from recondense.run import launching, sweeping
from recondense.run.overrides import COMPOSE_ERRORS, compose_run, groups_of
from recondense.run.preflight import preflight
from recondense.run.run_folder import overwritten_inputs
from recondense.run.search_path import initialize_hydra, same_configs
from recondense.run.steps import build_steps

NO_RUN = ("help", "hydra_help", "cfg", "info", "shell_completion", "experimental_rerun")


def command_hash() -> str:
    """Names a sweep's folder: the same command finds the same folder."""
    arguments = sorted(argument for argument in sys.argv[1:] if argument not in ("-m", "--multirun"))
    return hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:8]


# Cached in the config, which jobs in processes of other commands (joblib's, submitit's) are handed.
OmegaConf.register_new_resolver("command_hash", command_hash, replace=True, use_cache=True)
OmegaConf.register_new_resolver("expand_home", os.path.expanduser, replace=True)
# DeepSpeed warns where there is no GPU. Its import sets its logger's level anew; a filter stays.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def validate(task: Callable[..., Any], folder: Path, name: str, arguments: Sequence[str]) -> None:
    """Check a command before anything runs, every run of a sweep included.

    Args:
        task: the function that `hydra.main` decorates.
        folder: where its configs are.
        name: its primary config.
        arguments: the command line without the program.

    Raises:
        ConfigError: everything that is wrong.
    """
    args = get_args_parser().parse_args(list(arguments))
    if any(getattr(args, option) for option in NO_RUN):
        return
    problems: list[str] = []
    configs: list[Config] = []
    name = args.config_name or name
    with initialize_hydra(task, folder, name, args) as loader:
        multirun, hydra = _hydra(name, args.overrides, args.multirun)
        problems += sweeping.check(hydra, multirun)
        swept = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items() if multirun]
        intervals = multirun and sweeping.takes_intervals(hydra)
        jobs = _jobs([*swept, *args.overrides], multirun, intervals, loader, problems)
        problems += launching.of_a_sweep() if multirun else []
        of_all = tuple(problems)
        for overrides in jobs:
            found: list[str] = []
            values = compose_run(name, overrides, loader, found)
            problems += found
            if values is None:
                continue
            config, wrong = read(values)
            problems += [*wrong, *check_run(config, [*of_all, *found, *wrong])]
            problems += sweeping.check_metric(hydra, config.metric) if multirun else []
            configs.append(config)
    problems += _of_all_runs(configs)
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def _of_all_runs(configs: Sequence[Config]) -> list[str]:
    """What several runs of one command would do to each other."""
    problems = overwritten_inputs(configs)
    folders: dict[Path, str] = {}
    for config in configs:
        if folders.setdefault(config.run_folder(), config.run_hash()) != config.run_hash():
            problems.append(f"run_dir={config.run_dir}: several runs of the sweep would share it. Set run_dir=null.")
    return problems


def check_run(config: Config, found: Sequence[str] = ()) -> list[str]:
    """Problems of one run that show without its weights; `found`: those of its command that are known already."""
    try:
        steps, wrong = build_steps(config.method), []
    except ConfigError as error:
        # What is wrong with ${seed} was said of seed.
        steps, wrong = [], [text for text in error.messages if text.removeprefix("method.") not in found]
    return [*wrong, *preflight(config, steps, found)]


def _hydra(name: str, overrides: Sequence[str], multirun: bool) -> tuple[bool, dict[str, Any]]:
    """Whether the command is a sweep (an experiment may say so of itself), and its launcher and sweeper."""
    chosen = [text for text in overrides if text.startswith(("experiment=", "hydra.", "hydra/"))]
    nothing: dict[str, Any] = {"launcher": {}, "sweeper": {}}
    if not chosen and not multirun:
        return False, nothing
    try:
        hydra = compose(name, chosen, return_hydra_config=True).hydra
    except COMPOSE_ERRORS as error:
        if problem := sweeping.missing_plugin(str(getattr(error, "missing_cfg_file", ""))):
            raise ConfigError([problem]) from None  # nothing of an experiment that needs it can be composed
        return multirun, nothing  # reported where the jobs are composed
    multirun = multirun or str(hydra.mode).endswith("MULTIRUN")
    return multirun, {part: _plain(hydra[part]) for part in ("launcher", "sweeper")}


def _plain(settings: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(settings, enum_to_str=True))


def _jobs(
    overrides: Sequence[str], multirun: bool, intervals: bool, loader: ConfigLoader, problems: list[str]
) -> list[list[str]]:
    """The overrides of every run of a command; of an interval, of which every value may come, both ends."""
    parser = OverridesParser.create(config_loader=loader)
    parsed: list[Override] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except (OverrideParseException, HydraException):
            key, _, value = text.partition("=")
            quoted = f"'{key}=\"{value}\"'" if value.startswith("~") else "key='\"a, b\"'"
            problems.append(f"{text}: is no setting. Write key=value, and quote special characters: {quoted}.")
            continue
        if intervals and override.is_interval_sweep():
            ends = cast(IntervalSweep, override.value())
            override = parser.parse_override(f"{override.get_key_element()}={ends.start},{ends.end}")
        if override.is_interval_sweep():
            problems.append(f"{text}: only Optuna chooses from an interval. Add -m hydra/sweeper=optuna.")
            continue
        if override.is_sweep_override() and not multirun:
            key, _, values = text.partition("=")
            hint = "" if key in groups_of(loader) else f", or write a list: '{key}=[{values}]'"
            problems.append(f"{text}: several values for one run. Add -m to run each{hint}.")
            continue
        parsed.append(override)
    hydra_own = [cast(str, override.input_line) for override in parsed if override.is_hydra_override()]
    parsed = [override for override in parsed if not override.is_hydra_override()]
    if not multirun:
        return [[*hydra_own, *(cast(str, override.input_line) for override in parsed)]]
    return [[*hydra_own, *job] for job in BasicSweeper.split_arguments(parsed, None)[0]]


def again(script: str, hydra: Any) -> list[str]:
    """The command of another process of the run that is going on here.

    Args:
        script: train.py; a launcher may have started something else.
        hydra: the run's `hydra` config; of one of a sweep its own.
    """
    # An experiment may be a sweep by its own settings.
    alone = "hydra.mode=RUN", "hydra/sweeper=basic", "hydra/launcher=basic"
    return [sys.executable, script, *same_configs(hydra), *hydra.overrides.task, *alone]


class Reported(SystemExit):
    """The end of the process, after its reason was written."""


class JobFailed(Exception):
    """What the user can mend in one job of a sweep; callbacks/sweep.py keeps it from ending the others."""

    def __init__(self, messages: Sequence[str]) -> None:
        self.messages = tuple(messages)
        super().__init__(" ".join(self.messages))


@contextmanager
def exit_codes(*, sweep: bool = False, silent: bool = False) -> Iterator[None]:
    """2 and the message alone for what the user can mend, 130 or 143 for Ctrl-C or SIGTERM; a traceback for all else.

    Args:
        silent: without the message: another process writes the same.
        sweep: in a job of a sweep: what the user can mend is raised as `JobFailed` and does not end the process.
    """
    try:
        with _sigterm_exits():
            yield
    except Reported:
        raise
    except (UserError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") and not isinstance(error, ConfigError):
            raise
        messages = error.messages if isinstance(error, ConfigError) else (str(error),)
        if sweep:
            raise JobFailed(messages) from None
        if silent:
            raise Reported(2) from None
        refuse(messages)
    except KeyboardInterrupt:
        _stopped(130)
    except SystemExit as error:
        # Lightning turns Ctrl-C into exit code 1 after its own clean-up; our callback leaves with 128 + the signal.
        if error.code in (130, 143) or isinstance(error.__context__, KeyboardInterrupt):
            _stopped(143 if error.code == 143 else 130, silent=type(error) is not SystemExit)
        raise


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM ends the process like an error does, with clean-up; callbacks/graceful_stop.py takes over in a fit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def refuse(messages: Sequence[str]) -> NoReturn:
    """Write the messages and end the process with exit code 2."""
    lines = [f"recondense: {messages[0]}"]
    if len(messages) > 1:
        lines = [f"recondense: {len(messages)} problems", *(f"{i:2}. {text}" for i, text in enumerate(messages, 1))]
    print("\n".join(lines), file=sys.stderr)
    raise Reported(2) from None


def _stopped(code: int, *, silent: bool = False) -> NoReturn:
    """End the process; `silent`: whoever stopped it has said so."""
    if not silent:
        what = "stopped by SIGTERM" if code == 143 else "interrupted"
        print(f"recondense: {what}. The same command goes on where this run stopped.", file=sys.stderr)
    raise Reported(code) from None
