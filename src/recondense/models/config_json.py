"""The values of a model's config.json, read without torch and transformers, and comparisons of two of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from recondense.models.published_configs import recorded_ids, recorded_values
from recondense.offline import hub_access

Values = Mapping[str, Any]
PREFIX = "recondense_"  # of the model_type of bundled exports; the same as in compressed_classes.py, which needs torch
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # the name of a missing folder rarely looks like it
SIZES = (  # every family's names of the layers, routed experts and widths
    *("num_hidden_layers", "hidden_size", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts"),
    "moe_num_shared_experts",
)
DENSE_LAYERS = (  # names that say which layers have no routed experts; absent or empty if there are no exceptions
    *("mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace", "moe_layer_freq", "moe_layer_interval"),
    *("moe_layer_start_index", "moe_layer_end_index", "mlp_layer_types"),
)


def config_values(path: str, revision: str | None = None, *, hub: bool = True) -> dict[str, Any] | None:
    """Return the values of a model's config.json; None if it cannot be read, which loading the model explains.

    Args:
        path: a local folder or a hub id. The configs of published checkpoints are part of the package.
        revision: revision on the hub; None for the main branch.
        hub: whether the hub may be asked, or its cache.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path in recorded_ids():
            return recorded_values(path)
        file = _from_hub(path, revision) if hub and HUB_ID.fullmatch(path) else None
        return None if file is None else _read(file)
    return _read(folder / "config.json")


def _read(file: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


@lru_cache
def _from_hub(path: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download  # late, because few commands need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        with hub_access() as online:
            return Path(hf_hub_download(path, "config.json", revision=revision, local_files_only=not online))
    except (OSError, HfHubHTTPError, HFValidationError):  # no such model, no access to it, or no network
        return None


def model_type(values: Values) -> str:
    """Return the model_type of a config; for a bundled export, that of the model it was made from."""
    return str(values.get("model_type")).removeprefix(PREFIX)


def same_sizes(values: Values, reference: Values) -> bool:
    """Return whether a model has the layers, experts and widths of another one, which it had before a compression."""
    names = [name for name in SIZES if name in reference]
    return model_type(values) == model_type(reference) and all(values.get(name) == reference[name] for name in names)


def same_shape(values: Values, reference: Values) -> bool:
    """Return whether a model has the sizes of another one, in the same layers, and is not compressed."""
    if values.get("compressed_layers") or not same_sizes(values, reference):
        return False
    return all(_agree(values.get(name), reference.get(name)) for name in DENSE_LAYERS)


def _agree(one: Any, other: Any) -> bool:
    if isinstance(one, list) or isinstance(other, list):
        return (one or []) == (other or [])
    return one is None or other is None or one == other
