"""Write weights as safetensors shards of a bounded size, one piece at a time, without a second copy of the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from recondense.files import write_aside

INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Collect tensors and write them whenever a shard is full; at most one shard is in memory.

    Args:
        folder: the folder to write to. A single file is named `model.safetensors`; several are numbered and have an
            index.
        max_shard_size: maximum bytes per shard; a larger tensor gets its own shard.
    """

    def __init__(self, folder: Path, max_shard_size: int) -> None:
        self.folder = folder
        self.max_shard_size = max_shard_size
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._names: list[list[str]] = []
        self._bytes = 0
        self._parameters = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors by their names on disk; they are written when the shard is full."""
        for name, tensor in tensors.items():
            if self._held and self._held_bytes + tensor.nbytes > self.max_shard_size:
                self._flush()
            # A part of a larger tensor is copied, because a view would keep the larger one in memory.
            is_part = tensor.untyped_storage().nbytes() != tensor.nbytes
            self._held[name] = tensor.detach().clone() if is_part else tensor.detach().contiguous()
            self._held_bytes += tensor.nbytes
            self._bytes += tensor.nbytes
            self._parameters += tensor.numel()

    def finish(self) -> None:
        """Write the last shard, give the files their final names, and write the index."""
        self._flush()
        count = len(self._names)
        if count == 1:
            os.replace(self._partial(1), self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names, start=1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(self._partial(number), self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {
            "metadata": {"total_size": self._bytes, "total_parameters": self._parameters},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_aside(self.folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        if self._held:
            self._names.append(list(self._held))
            save_file(self._held, self._partial(len(self._names)), metadata={"format": "pt"})
            self._held, self._held_bytes = {}, 0

    def _partial(self, number: int) -> Path:
        return self.folder / f"model-{number:05d}.safetensors"
