"""Patterns of sparse layers: how the configs of a family say which decoder layers are sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import PretrainedConfig


class Pattern(NamedTuple):
    """How a config says which decoder layers are sparse.

    Args:
        read: returns for each layer whether it is sparse.
        write: returns the config updates for given sparse layers; None if a config cannot express them.
    """

    read: Callable[[PretrainedConfig], list[bool]]
    write: Callable[[Sequence[bool]], dict[str, Any] | None]


def _dense_first(sparse: Sequence[bool]) -> int | None:
    """Return the number of dense layers before the sparse ones; None if a dense layer follows a sparse one."""
    first = list(sparse).index(True) if any(sparse) else len(sparse)
    return first if all(sparse[first:]) else None


def _write_prefix(sparse: Sequence[bool]) -> dict[str, Any] | None:
    first = _dense_first(sparse)
    return None if first is None else {"first_k_dense_replace": first}


def _write_frequency(sparse: Sequence[bool]) -> dict[str, Any] | None:
    prefix = _write_prefix(sparse)
    return None if prefix is None else {**prefix, "moe_layer_freq": 1}


def _read_mlp_only(config: PretrainedConfig) -> list[bool]:
    return [
        layer not in (config.mlp_only_layers or ())
        and config.num_experts > 0
        and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(config.num_hidden_layers)
    ]


def _read_interval(config: PretrainedConfig) -> list[bool]:
    return [
        (layer + 1) % config.moe_layer_interval == 0
        and config.moe_layer_start_index <= layer <= config.moe_layer_end_index
        for layer in range(config.num_hidden_layers)
    ]


def _write_interval(sparse: Sequence[bool]) -> dict[str, Any] | None:
    layers = [layer for layer, is_sparse in enumerate(sparse) if is_sparse]
    first, last = (layers[0], layers[-1]) if layers else (len(sparse), len(sparse) - 1)
    if len(layers) != last - first + 1:
        return None
    return {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": 1}


EVERY = Pattern(lambda config: [True] * config.num_hidden_layers, lambda sparse: {} if all(sparse) else None)
MLP_ONLY = Pattern(
    _read_mlp_only,
    lambda sparse: {
        "mlp_only_layers": [layer for layer, is_sparse in enumerate(sparse) if not is_sparse],
        "decoder_sparse_step": 1,
    },
)
PREFIXED = Pattern(
    lambda config: [layer >= config.first_k_dense_replace for layer in range(config.num_hidden_layers)], _write_prefix
)
FREQUENCY = Pattern(
    lambda config: [
        layer >= config.first_k_dense_replace and layer % config.moe_layer_freq == 0
        for layer in range(config.num_hidden_layers)
    ],
    _write_frequency,
)
INTERVAL = Pattern(_read_interval, _write_interval)
TYPES = Pattern(
    lambda config: [kind == "sparse" for kind in config.mlp_layer_types],
    lambda sparse: {"mlp_layer_types": ["sparse" if is_sparse else "dense" for is_sparse in sparse]},
)
