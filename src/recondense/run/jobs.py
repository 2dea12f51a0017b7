"""The runs of a command: whether it is a sweep, and the overrides of each of its runs."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, cast

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep, ValueType
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf

from recondense.config.problems import Problem, render
from recondense.config.schema import from_dict
from recondense.config.stages import require_stages
from recondense.errors import ConfigError
from recondense.run import sweeping
from recondense.run.build_steps import build_steps
from recondense.run.checks_without_torch import is_done
from recondense.run.done_runs import as_done
from recondense.run.resolved_run import Run
from recondense.run.search_path import as_written, initialize_hydra, same_configs
from recondense.run.unknown_overrides import COMPOSE_ERRORS, compose_run, list_choices, list_groups

Overrides = tuple[str, ...]
MOST_RUNS = 10_000  # of a sweep: each is checked before the first one starts


def read_sweep(name: str, overrides: Sequence[str], multirun: bool) -> tuple[bool, dict[str, Any]]:
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


def split_jobs(
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
        override = _parse(text, parser, problems)
        if override is None:
            continue
        override.config_loader = loader  # names the choices of a glob
        if intervals and override.is_interval_sweep():
            ends = cast(IntervalSweep, override.value())
            override = parser.parse_override(f"{override.get_key_element()}={ends.start},{ends.end}")
        if (problem := _check_values(override, multirun, loader)) is None:
            parsed.append(override)
        else:
            problems.append(problem)
    hydra_overrides = [str(override.input_line) for override in parsed if override.is_hydra_override()]
    parsed = [override for override in parsed if not override.is_hydra_override()]
    runs = math.prod(len(_values(override)) for override in parsed if override.is_sweep_override())
    if runs > MOST_RUNS:
        problems.append(Problem("-m", f"these are {runs} runs; at most {MOST_RUNS} can be checked and compared."))
        return []
    jobs = BasicSweeper.split_arguments(parsed, None)[0] if multirun else [[str(line.input_line) for line in parsed]]
    return [(tuple(job), hydra_overrides) for job in jobs]


def _parse(text: str, parser: OverridesParser, problems: list[Problem]) -> Override | None:
    """Return an override. One that cannot be read becomes a problem; its value is then taken literally if possible."""
    try:
        return parser.parse_override(text)
    except (OverrideParseException, HydraException):
        key, equals, value = text.partition("=")
    name = key.lstrip("+~")
    if not equals or not re.fullmatch(r"[\w./@-]+", name):
        problems.append(Problem(text, "is not a setting. Write key=value."))
        return None
    as_written = f"{name}={value}"
    if value.startswith(("[", "{", "(")):
        text = "the brackets or commas cannot be read. Write 'key=[a, b]' or 'key={a: b}', and quote special characters"
        problems.append(Problem(as_written, f"{text}: 'key=[\"a=b\"]'."))
        return None
    if value.count("${") > value.count("}"):
        problems.append(Problem(as_written, "the ${ has no }. Write ${setting}, or ${oc.env:VARIABLE}."))
        return None
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    quoted = f'{key}="{escaped}"'
    problems.append(Problem(as_written, f"the value has special characters. Quote it: {shlex.quote(quoted)}."))
    try:
        return parser.parse_override(quoted)
    except (OverrideParseException, HydraException):
        return None


def _check_values(override: Override, multirun: bool, loader: ConfigLoader) -> Problem | None:
    """Return a problem of an override that has several values, or should have some."""
    text = str(override.input_line)
    key, _, written = text.partition("=")
    if not override.is_sweep_override():
        return None
    if override.is_interval_sweep():
        return Problem(text, "only Optuna can sweep an interval. Add -m hydra/sweeper=optuna.")
    group = key in list_groups(loader)
    if not multirun:
        simple = override.value_type is ValueType.SIMPLE_CHOICE_SWEEP and not group
        hint = f", write a list: '{key}=[{written}]', or quote one value: '{key}=\"{written}\"'" if simple else ""
        return Problem(text, f"one run cannot have several values. Add -m to run each{hint}.")
    value = override.value()
    if isinstance(value, RangeSweep):
        start, stop, step = (float(number or 0) for number in (value.start, value.stop, value.step))
        if not math.isfinite(start + stop + step) or not step:
            return Problem(text, "a range needs finite numbers, and a step that is not 0.")
        if (stop - start) / step > MOST_RUNS:
            return Problem(text, f"a range of more than {MOST_RUNS} values.")
    values = _values(override)
    if isinstance(value, Glob):
        choices = [name for name in list_choices(key, loader) if "/" not in name] if group else []
        if hidden := [name for name in values if name not in choices]:
            return Problem(text, f"also matches {', '.join(hidden)}, which is no choice. Add exclude=_* to the glob.")
        if not values:
            reason = f"no {key} matches. Choices: {', '.join(choices)}." if group else "only choices of a group match."
            return Problem(text, reason)
    return None if values else Problem(text, "there is no value in it.")


def _values(override: Override) -> list[str]:
    """Return the values of a sweep over some values."""
    return list(override.sweep_string_iterator())


def resolve_job(context: Any) -> Run:
    """Return the run of a job that was not known when the command was checked, composed in the same way.

    Args:
        context: the job's `hydra` config.

    Raises:
        ConfigError: the run has problems; the error lists all of them.
    """
    from recondense.run.reachable_budget import reachable  # late: it imports torch

    args = get_args_parser().parse_args(same_configs(context))
    problems: list[Problem] = []
    with initialize_hydra(args.config_name, args) as loader:
        values = compose_run(args.config_name, list(as_written(context.overrides.task)), loader, problems)
    if problems or values is None:
        raise ConfigError(render(problems))
    config = as_done(from_dict(values))
    if not is_done(config):
        config = reachable(config)
    return Run(config, require_stages(config), build_steps(config.method))
