"""The memory that a search may take for temporary tensors."""

from __future__ import annotations

import psutil
import torch
from transformers import PreTrainedModel

from recondense import processes
from recondense.config.schema import Config
from recondense.models.layer_store import layer_store
from recondense.models.parameters import largest_layer_bytes


def scratch_bytes(config: Config, device: torch.device, model: PreTrainedModel | None = None) -> int:
    """Return the bound on temporary tensors: as configured, or a quarter of the memory that is free now, for all processes.

    For a model larger than memory, as much as its largest decoder layer.
    """
    if config.max_scratch_bytes != "auto":
        return config.max_scratch_bytes
    if model is not None and layer_store(model).streamed:
        return max(largest_layer_bytes(model), 1 << 26)
    on_cpu = psutil.virtual_memory().available // processes.world_size()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else on_cpu
    return processes.broadcast(max(free // 4, 1 << 26))
