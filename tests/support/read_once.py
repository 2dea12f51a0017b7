"""Hydra reads every YAML anew for each config that it composes: half of the time, and tests compose thousands."""

from __future__ import annotations

import gc
import pickle
from typing import Any

from hydra._internal.config_repository import ConfigRepository

_read = ConfigRepository.load_config
_kept: dict[Any, bytes] = {}


def _load_config(self: ConfigRepository, config_path: str) -> Any:
    """A copy of what the same sources gave before: composing changes it."""
    key = (tuple((source.provider, source.path) for source in self.sources), config_path)
    if key not in _kept:
        _kept[key] = pickle.dumps(_read(self, config_path))
    return pickle.loads(_kept[key])


def read_configs_once() -> None:
    """From here on, for this process; a test that changes a config's file does so in a folder of its own."""
    ConfigRepository.load_config = _load_config  # type: ignore[method-assign]


def leave_imports_to_the_end() -> None:
    """What is imported stays: the collector need not look through half a million objects again and again."""
    gc.collect()
    gc.freeze()
