"""The memory that a search may use for temporary tensors."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from recondense import processes
from recondense.config.schema import Config
from recondense.models.free_memory import free_bytes
from recondense.models.layer_store import layer_store
from recondense.models.parameters import largest_layer_bytes


def scratch_bytes(config: Config, device: torch.device, model: PreTrainedModel | None = None) -> int:
    """Return the maximum bytes of temporary tensors, which is the same in all processes.

    The bound is the configured one or, with `auto`, a quarter of the free memory. For a streamed model, `auto` is the
    size of the largest decoder layer.

    Args:
        config: settings of the run.
        device: device of the tensors.
        model: the model; None if it is not streamed.
    """
    if config.max_scratch_bytes != "auto":
        return config.max_scratch_bytes
    if model is not None and layer_store(model).streamed:
        return max(largest_layer_bytes(model), 1 << 26)
    free = free_bytes(device) // (1 if device.type == "cuda" else processes.world_size())
    return processes.broadcast(max(free // 4, 1 << 26))
