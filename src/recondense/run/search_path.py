"""The folders in which Hydra finds the configs of a command: conf/, --config-path, --config-dir, hydra.searchpath.

`hydra.main` determines them when it starts. This module uses the same folders earlier, to check a command.
"""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from hydra import initialize_config_dir, version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from hydra.plugins.config_source import ConfigSource
from omegaconf import ListConfig, OmegaConf

from recondense.errors import ConfigError

CONFIGS = (Path(__file__).parents[1] / "conf").resolve()  # a link in the repository, a folder in a wheel
SETTING = "hydra.searchpath"
OPTIONS = {"main": "--config-path", "command-line": "--config-dir"}  # Hydra's name of a folder's provider: the option


@contextmanager
def compose_from_package() -> Iterator[None]:
    """Let `compose` read conf/ inside the context, also in a program that uses Hydra itself."""
    before = get_gh_backup()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            yield
    finally:
        restore_gh_from_backup(before)


@contextmanager
def initialize_hydra(name: str, args: Namespace) -> Iterator[ConfigLoader]:
    """Initialize Hydra, so that `compose` and the yielded loader use the same configs as `hydra.main`.

    Args:
        name: name of the primary config.
        args: the command line, parsed by Hydra's parser; --config-path is absolute.

    Raises:
        ConfigError: a folder does not exist.
    """
    version.setbase("1.3")
    folder = str(CONFIGS) if args.config_path is None else args.config_path
    search_path = create_automatic_config_search_path(None, None, folder)
    if args.config_dir is not None:
        _add(search_path, "command-line", f"file://{os.path.abspath(args.config_dir)}")
    sources = _sources(search_path, name, [text for text in args.overrides if text.startswith(f"{SETTING}=")])
    requested = [source for source in sources if source.provider in OPTIONS or source.provider.startswith(SETTING)]
    missing = [source for source in requested if not source.available()]
    if missing:
        raise ConfigError(
            f"{OPTIONS.get(source.provider, SETTING)}={source.path}: there is no such folder." for source in missing
        )
    for source in requested:
        if source.provider not in OPTIONS:
            _add(search_path, source.provider, f"{source.scheme()}://{source.path}")
    before = get_gh_backup()
    GlobalHydra.instance().clear()  # a job composes again while Hydra runs it
    Hydra.create_main_hydra2("train", search_path)
    try:
        yield GlobalHydra.instance().config_loader()
    finally:
        restore_gh_from_backup(before)


def same_configs(hydra: Any) -> list[str]:
    """Return the arguments with which another process uses the primary config and the folders of this run.

    The options come first, because Hydra's parser requires contiguous overrides.

    Args:
        hydra: the run's `hydra` config.
    """
    arguments = []
    for source in hydra.runtime.config_sources:
        if source.provider in OPTIONS:
            path = source.path if source.schema == "file" else f"{source.schema}://{source.path}"
            arguments.append(f"{OPTIONS[source.provider]}={path}")
    arguments.append(f"--config-name={hydra.job.config_name}")
    return [*arguments, *(text for text in hydra.overrides.hydra if text.startswith(f"{SETTING}="))]


def as_written(overrides: Sequence[str] | None) -> tuple[str, ...]:
    """Return overrides of Hydra's config as the command has them. Read one by one, their `${...}` would be resolved."""
    return (
        ()
        if overrides is None
        else tuple(cast(list[str], OmegaConf.to_container(cast(ListConfig, overrides), resolve=False)))
    )


def _add(search_path: ConfigSearchPath, provider: str, path: str) -> None:
    """Add a folder after all others, but before the schemas, which Hydra requires at the end."""
    search_path.prepend(provider, path, SearchPathQuery(provider="schema"))


def _sources(search_path: ConfigSearchPath, name: str, overrides: Sequence[str]) -> list[ConfigSource]:
    """Return Hydra's sources of configs, including hydra.searchpath of the primary config or of an override."""
    loader = ConfigLoaderImpl(search_path)
    try:
        with warnings.catch_warnings(action="ignore"):  # Hydra warns about missing folders
            return loader._parse_overrides_and_create_caching_repo(name, list(overrides))[1].get_sources()
    except OverrideParseException:
        return loader.get_sources()  # the command line reports the invalid override later
    except HydraException as error:
        raise ConfigError([" ".join([*overrides, f"{error}"])]) from None
