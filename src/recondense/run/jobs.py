"""The runs of a command: whether it is a sweep, and the overrides of each of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf

from recondense.config.problems import Problem, render
from recondense.errors import ConfigError
from recondense.run import sweeping
from recondense.run.unknown_overrides import COMPOSE_ERRORS, list_groups

Overrides = tuple[str, ...]


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
