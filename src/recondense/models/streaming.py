"""A model larger than memory: a decoder layer's weights are read when it is used, and let go of for the next one.

What is outside the decoder layers (embedding, final norm, head) stays in memory. A layer is read in two parts, its
feed-forward block and the rest, each from the checkpoint's shards or from a file that `put_away` wrote. Of a model that
is whole in memory, `resident` and `put_away` do nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from recondense.files import file_name, fingerprint, replace_file, write_aside
from recondense.models import decoder, views
from recondense.models.headers import opened
from recondense.models.shard_reader import Shards, State, aligned, exchanged, without_aliases, without_weights
from recondense.models.tensor_store import Disk, Memory, Storage

_pages: weakref.WeakKeyDictionary[nn.Module, Pages] = weakref.WeakKeyDictionary()


@contextmanager
def resident(model: PreTrainedModel, layer: int) -> Iterator[None]:
    """Inside, a decoder layer, as it stands in the model now, has its weights; nothing else needs to have."""
    pages = _pages.get(model)
    if pages is None:
        yield
        return
    with pages.held(model, layer):
        yield


def put_away(model: PreTrainedModel, block: nn.Module, name: str | None = None) -> nn.Module:
    """A block that stands in a layer later: its weights are in memory only while that layer is used.

    Args:
        name: its file is kept under it; None: it is gone with the block.

    Returns:
        a block that computes the same; the given one where the model is whole in memory.
    """
    pages = _pages.get(model)
    return block if pages is None else pages.put_away(block, name)


def taken_back(model: PreTrainedModel, shaped: Callable[[], nn.Module], name: str) -> nn.Module | None:
    """The block that was put away under a name, in this process or in an earlier one; None if there is none.

    Args:
        shaped: makes one of its shapes; what its weights are does not matter.
    """
    pages = _pages.get(model)
    return None if pages is None else pages.taken_back(shaped, name)


def storage(model: PreTrainedModel) -> Storage:
    """Where states of a model's own go: on the disk for one larger than memory."""
    pages = _pages.get(model)
    return Memory() if pages is None else Disk(pages.folder, device=decoder.device(model))


def is_streamed(model: PreTrainedModel) -> bool:
    """Whether the model's decoder layers are read when they are used."""
    return model in _pages


def bring_in(model: PreTrainedModel) -> None:
    """Read all that stands in the model's layers now: from here on it is whole in memory, and frozen."""
    pages = _pages.pop(model, None)
    if pages is not None:
        pages.bring_in(model)
        model.requires_grad_(False)


def identify(model: PreTrainedModel, key: str) -> None:
    """Say what decides the blocks that will be put away: the weights, and what they are computed on.

    Files of a run with another key, in the same folder, are not taken back.
    """
    pages = _pages.get(model)
    if pages is not None:
        pages.identity = key


def identity(model: PreTrainedModel) -> str:
    """What `identify` said; empty of a model that is whole in memory."""
    pages = _pages.get(model)
    return "" if pages is None else pages.identity


def standing(model: PreTrainedModel) -> str:
    """A fingerprint of what stands in the layers of a streamed model: its own blocks, and those that were put away.

    Empty of a model that is whole in memory.
    """
    pages = _pages.get(model)
    if pages is None:
        return ""
    layers = range(len(decoder.decoder_layers(model)))
    return fingerprint(pages.identity, [name_standing(model, layer) for layer in layers])


def name_standing(model: PreTrainedModel, layer: int) -> list[str]:
    """What a layer of a streamed model and its block were put away as; empty texts for the checkpoint's own."""
    pages = _pages.get(model)
    units = [decoder.decoder_layers(model)[layer], views.get_block(model, layer)]
    return [] if pages is None else [pages.name_of(unit) for unit in units]


def remember(model: PreTrainedModel, name: str, values: dict[str, float]) -> None:
    """Keep a few numbers beside a block that was put away under a name."""
    pages = _pages.get(model)
    if pages is not None:
        write_aside(pages.folder / f"{file_name(name)}.json", json.dumps(values))


def remembered(model: PreTrainedModel, name: str) -> dict[str, float]:
    """What was kept beside a block; empty if nothing."""
    pages = _pages.get(model)
    path = None if pages is None else pages.folder / f"{file_name(name)}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}


def is_put_away(model: PreTrainedModel, name: str) -> bool:
    """Whether there is a block of this name; never of a model that is whole in memory, which keeps none."""
    pages = _pages.get(model)
    return pages is not None and pages.path_of(name).exists()


def bytes_outside_layers(model: PreTrainedModel) -> int:
    """Of what is always in memory: embedding, final norm and head, tied ones once."""
    inside = decoder.layers_prefix()
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if not name.startswith(inside))


def page_bytes(model: PreTrainedModel) -> int:
    """Of the largest decoder layer, as it stands now."""
    states = (layer.state_dict().values() for layer in decoder.decoder_layers(model))
    return max(sum(tensor.numel() * tensor.element_size() for tensor in state) for state in states)


class Pages:
    """Where the weights of a model's decoder layers are read from, and which of them are in memory.

    Args:
        model: its decoder layers without weights, all else loaded.
        files: the safetensors files of the checkpoint.
        load_config: how transformers would read them: conversions, dtypes, quantisation.
        folder: for what is put away; made when something is.
        reading: a context in which transformers reads the weights as they are stored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: Sequence[str],
        load_config: Any,
        folder: Path,
        reading: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.folder = folder
        self.identity = ""
        self._numbers = count()
        self._shards = Shards(model, files, load_config, reading)
        self._sources: weakref.WeakKeyDictionary[nn.Module, Callable[[], State]] = weakref.WeakKeyDictionary()
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._loaded: dict[nn.Module, State] = {}  # units with their tensors of the meta device
        self._held: Counter[nn.Module] = Counter()
        for layer, module in enumerate(decoder.decoder_layers(model)):
            block, inside = views.get_block(model, layer), views.block_name(layer)
            own = decoder.layer_prefix(layer)
            names = [own + name for name in module.state_dict()]
            rest = [name for name in names if not name.startswith(f"{inside}.")]
            self._sources[module] = self._reader(rest, own)
            self._sources[block] = self._reader([name for name in names if name not in rest], f"{inside}.")
        _pages[model] = self

    def _reader(self, names: Sequence[str], prefix: str) -> Callable[[], State]:
        return lambda: {name.removeprefix(prefix): tensor for name, tensor in self._shards.read(names)}

    def load_the_rest(self, model: PreTrainedModel) -> tuple[Any, Any]:
        """Read what is outside the decoder layers; what transformers' loading returns."""
        info, index = self._shards.load(model, lambda name: not name.startswith(decoder.layers_prefix()))
        info.missing_keys = {name for name in info.missing_keys if name not in self._shards}
        return info, index

    @contextmanager
    def held(self, model: PreTrainedModel, layer: int) -> Iterator[None]:
        """Inside, both parts of a layer are in memory; before, those of others go that nobody holds."""
        units = {decoder.decoder_layers(model)[layer]: None, views.get_block(model, layer): None}
        known = [unit for unit in units if unit in self._sources]
        for unit in [unit for unit in self._loaded if unit not in known and not self._held[unit]]:
            self._let_go(unit)
        for unit in known:
            self._held[unit] += 1
        try:
            for unit in known:
                if unit not in self._loaded:
                    state = self._sources[unit]()
                    self._loaded[unit] = exchanged(unit, state)
                    del state
            yield
        finally:
            for unit in known:
                self._held[unit] -= 1
                if not self._held[unit]:
                    del self._held[unit]  # it must not keep what nobody uses any more

    def bring_in(self, model: PreTrainedModel) -> None:
        """See the function of this name."""
        for layer in range(len(decoder.decoder_layers(model))):
            with self.held(model, layer):
                self._loaded.clear()  # without giving back: they stay

    def _let_go(self, unit: nn.Module) -> None:
        exchanged(unit, self._loaded.pop(unit))
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # glibc keeps what tensors of a few megabytes took

    def name_of(self, unit: nn.Module) -> str:
        """What a part of a layer was put away as; of the checkpoint's own the empty text, of others their class."""
        return self._names.get(unit, "" if unit in self._sources else type(unit).__name__)

    def path_of(self, name: str) -> Path:
        """The file of what was put away under a name."""
        return self.folder / f"{file_name(name)}.safetensors"

    def put_away(self, block: nn.Module, name: str | None) -> nn.Module:
        """See the function of this name."""
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in block.state_dict().items()}
        path = self.path_of(name or f"block-{os.getpid()}-{next(self._numbers)}")
        with replace_file(path) as aside:
            save_file(without_aliases(state), aside)
        device = next((tensor.device for tensor in block.state_dict().values()), torch.device("cpu"))
        found = without_weights(block)
        self._register(found, path, device)
        self._names[found] = name or path.stem
        if name is None:
            weakref.finalize(found, path.unlink, missing_ok=True)
        return found

    def taken_back(self, shaped: Callable[[], nn.Module], name: str) -> nn.Module | None:
        """See the function of this name."""
        path = self.path_of(name)
        if not path.exists():
            return None
        block = shaped()
        device = next((tensor.device for tensor in block.state_dict().values()), torch.device("cpu"))
        found = without_weights(block)
        self._register(found, path, self._shards.device if device.type == "meta" else device)
        self._names[found] = name
        return found

    def _register(self, unit: nn.Module, path: Path, device: torch.device) -> None:
        def read() -> State:
            with opened(path) as file:
                return {key: aligned(file.get_tensor(key).to(device)) for key in file.keys()}  # noqa: SIM118

        self._sources[unit] = read
