"""Faster tests: Hydra reads a YAML once, and the garbage collector skips what is imported.

Hydra reads every YAML again for each config that it composes. That takes half of the time, and tests compose thousands.
"""

from __future__ import annotations

import gc
import pickle
from typing import Any

from hydra._internal.config_repository import ConfigRepository

_read = ConfigRepository.load_config
_cache: dict[Any, bytes] = {}


def _load_config(self: ConfigRepository, config_path: str) -> Any:
    """A copy of the cached config, because composing changes it."""
    key = (tuple((source.provider, source.path) for source in self.sources), config_path)
    if key not in _cache:
        _cache[key] = pickle.dumps(_read(self, config_path))
    return pickle.loads(_cache[key])


def read_configs_once() -> None:
    """Cache configs in this process; a test that changes a config file must use a folder of its own."""
    ConfigRepository.load_config = _load_config  # type: ignore[method-assign]


def freeze_imported_objects() -> None:
    """Imported modules stay in memory, so the collector need not search their half a million objects."""
    gc.collect()
    gc.freeze()
