"""Stream a model larger than memory: read a decoder layer's weights when it is used, and release them for the next one.

The weights outside the decoder layers (embedding, final norm, head) stay in memory. A layer is read as two units: its
MoE block (or dense MLP), and everything else. A unit comes from the checkpoint's shards or from a file that `offload`
wrote.
"""

from __future__ import annotations

import ctypes
import json
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from recondense import files
from recondense.models import decoder, moe_blocks
from recondense.models.checked_tensors import is_intact, save_checked
from recondense.models.headers import open_safetensors
from recondense.models.layer_store import InMemory, set_layer_store
from recondense.models.shard_reader import ShardReader, State, align, empty_copy, swap_tensors, unalias
from recondense.models.tensor_store import Disk, Storage

NOTES = "notes"  # a key in the metadata of an offloaded file


class Streamed:
    """The layer store of a streamed model.

    `resident` reads a layer, which stays in memory until another layer is used.

    Args:
        model: the model. Its decoder layers do not have weights.
        shard_files: the safetensors files of the checkpoint.
        load_config: transformers' settings for loading: conversions, dtypes, quantization.
        folder: the folder for offloaded blocks; it is created when the first one is written.
        reading: makes a context in which transformers reads the stored weights correctly.
    """

    streamed = True

    def __init__(
        self,
        model: PreTrainedModel,
        shard_files: Sequence[str],
        load_config: Any,
        folder: Path,
        reading: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.folder = folder
        self.context = ""
        self._model_ref = weakref.ref(model)  # weak, because the model refers to its store
        self._numbers = count()
        self._shards = ShardReader(model, shard_files, load_config, reading)
        self._sources: weakref.WeakKeyDictionary[nn.Module, Callable[[], State]] = weakref.WeakKeyDictionary()
        self._keys: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._checked: set[Path] = set()
        self._loaded: dict[nn.Module, State] = {}  # loaded units, with the meta tensors that they had before
        self._users: Counter[nn.Module] = Counter()
        for layer, module in enumerate(decoder.decoder_layers(model)):
            layer_prefix, block_prefix = decoder.layer_prefix(layer), f"{moe_blocks.block_name(layer)}."
            names = [layer_prefix + name for name in module.state_dict()]
            outside_block = [name for name in names if not name.startswith(block_prefix)]
            self._sources[module] = self._shard_source(outside_block, layer_prefix)
            self._sources[moe_blocks.get_block(model, layer)] = self._shard_source(
                [name for name in names if name not in outside_block], block_prefix
            )

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError("a streamed model cannot be copied; call load_all() of its layer store first")

    @property
    def _model(self) -> PreTrainedModel:
        model = self._model_ref()
        assert model is not None
        return model

    def load_outside_layers(self) -> tuple[Any, Any]:
        """Read the weights outside the decoder layers, and return what transformers' own loading returns."""
        info, index = self._shards.load(self._model, lambda name: not name.startswith(decoder.layers_prefix()))
        info.missing_keys = {name for name in info.missing_keys if name not in self._shards}
        return info, index

    @contextmanager
    def resident(self, layer: int) -> Iterator[None]:
        """Keep a layer in memory inside the context, see `LayerStore`; layers not in use are released first."""
        units = dict.fromkeys(self._units(layer))
        known = [unit for unit in units if unit in self._sources]
        for unit in [unit for unit in self._loaded if unit not in known and not self._users[unit]]:
            self._release(unit)
        for unit in known:
            self._users[unit] += 1
        try:
            for unit in known:
                if unit not in self._loaded:
                    state = self._sources[unit]()
                    self._loaded[unit] = swap_tensors(unit, state)
                    del state
            yield
        finally:
            for unit in known:
                self._users[unit] -= 1
                if not self._users[unit]:
                    del self._users[unit]  # otherwise the counter would keep the module alive

    def offload(self, block: nn.Module, key: str | None = None, notes: Mapping[str, float] | None = None) -> nn.Module:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in block.state_dict().items()}
        path = self._path(key or f"block-{os.getpid()}-{next(self._numbers)}")
        save_checked(unalias(state), path, {NOTES: json.dumps(dict(notes or {}))})
        if key is not None:
            self._checked.add(path)
        offloaded = self._offloaded(block, path, key or path.stem, torch.device("cpu"))
        if key is None:
            weakref.finalize(offloaded, path.unlink, missing_ok=True)
        return offloaded

    def load_back(self, key: str, make_block: Callable[[], nn.Module]) -> nn.Module | None:
        if not self.is_offloaded(key):
            return None
        return self._offloaded(make_block(), self._path(key), key, self._shards.device)

    def is_offloaded(self, key: str) -> bool:
        path = self._path(key)
        if path not in self._checked and is_intact(path):
            self._checked.add(path)
        return path in self._checked

    def notes(self, key: str) -> dict[str, float]:
        if not self.is_offloaded(key):
            return {}
        with open_safetensors(self._path(key)) as file:
            notes: dict[str, float] = json.loads((file.metadata() or {}).get(NOTES, "{}"))
        return notes

    def layer_keys(self, layer: int) -> list[str]:
        """Return the keys of a layer's units, see `LayerStore`; a new unit without a key is identified by its class."""
        return [
            self._keys.get(unit, "" if unit in self._sources else type(unit).__name__) for unit in self._units(layer)
        ]

    def fingerprint(self) -> str:
        layers = range(len(decoder.decoder_layers(self._model)))
        return files.fingerprint(self.context, [self.layer_keys(layer) for layer in layers])

    def tensor_storage(self) -> Storage:
        return Disk(self.folder, device=decoder.device(self._model))

    def load_all(self) -> None:
        for layer in range(len(decoder.decoder_layers(self._model))):
            with self.resident(layer):
                self._loaded.clear()  # so that the layer is never released
        self._model.requires_grad_(False)
        set_layer_store(self._model, InMemory())

    def _units(self, layer: int) -> list[nn.Module]:
        """Return the two modules of a layer that are read separately; for a removed layer both are the same."""
        return [decoder.decoder_layers(self._model)[layer], moe_blocks.get_block(self._model, layer)]

    def _shard_source(self, names: Sequence[str], prefix: str) -> Callable[[], State]:
        return lambda: {name.removeprefix(prefix): tensor for name, tensor in self._shards.read(names)}

    def _release(self, unit: nn.Module) -> None:
        swap_tensors(unit, self._loaded.pop(unit))
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # otherwise glibc keeps the memory of freed tensors of a few megabytes

    def _path(self, key: str) -> Path:
        return self.folder / f"{files.file_name(key)}.safetensors"

    def _offloaded(self, block: nn.Module, path: Path, key: str, meta_device: torch.device) -> nn.Module:
        """Return a block without weights whose weights are read from a file when its layer is used.

        Args:
            block: a block of the same shape; its device is that of the weights.
            path: the file.
            key: the key of the block.
            meta_device: the device of the weights if `block` is on the meta device.
        """
        device = next((tensor.device for tensor in block.state_dict().values()), torch.device("cpu"))
        offloaded = empty_copy(block)
        target = meta_device if device.type == "meta" else device

        def read() -> State:
            with open_safetensors(path) as file:
                return {name: align(file.get_tensor(name).to(target)) for name in file.keys()}  # noqa: SIM118

        self._sources[offloaded] = read
        self._keys[offloaded] = key
        return offloaded
