"""What every layer store can do, and the store of a model in memory. `streaming.py` has that of a model on disk.

Every model has one layer store: `with layer_store(model).resident(layer): ...`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn
from transformers import PreTrainedModel

from recondense.models.tensor_store import Memory, Storage

ATTRIBUTE = "_recondense_layer_store"  # of a model


class LayerStore(Protocol):
    """Keeps the weights of a model's decoder layers.

    Attributes:
        streamed: whether a layer's weights are read from disk when the layer is used.
        context: identifies what blocks depend on besides the plan: the model's weights and the calibration set. A store
            does not load back blocks that were offloaded in another context.
    """

    streamed: bool
    context: str

    def resident(self, layer: int) -> AbstractContextManager[None]:
        """Keep the weights of one decoder layer, with its current block, in memory inside the context."""
        ...

    def offload(self, block: nn.Module, key: str | None = None, notes: Mapping[str, float] | None = None) -> nn.Module:
        """Write a block's weights to disk, to be read whenever its layer is used.

        Args:
            block: the block.
            key: a name under which the file stays; None deletes the file together with the block.
            notes: a few numbers to save with the weights.

        Returns:
            A block that computes the same; `block` itself if the model is in memory.
        """
        ...

    def load_back(self, key: str, make_block: Callable[[], nn.Module]) -> nn.Module | None:
        """Return the block that this or an earlier process offloaded under a key; None if there is none.

        Args:
            key: the name of the file.
            make_block: makes a block of the same shape, with or without weights.
        """
        ...

    def is_offloaded(self, key: str) -> bool:
        """Return whether `load_back` has a block for this key."""
        ...

    def notes(self, key: str) -> dict[str, float]:
        """Return the numbers that were saved with a block; empty if there are none."""
        ...

    def layer_keys(self, layer: int) -> list[str]:
        """Return the keys of a decoder layer and of its block; the key of weights in the checkpoint is empty."""
        ...

    def fingerprint(self) -> str:
        """Return a fingerprint of the context and of the keys of all layers; empty if the model is in memory."""
        ...

    def tensor_storage(self) -> Storage:
        """Return the storage for hidden states of a pass through all layers."""
        ...

    def load_all(self) -> None:
        """Load all layers permanently and freeze the model. From then on its store is `InMemory`."""
        ...


class InMemory:
    """The store of a model whose weights are all in memory. It never loads or offloads anything."""

    streamed = False

    def __init__(self) -> None:
        self.context = ""

    def resident(self, layer: int) -> AbstractContextManager[None]:
        return nullcontext()

    def offload(self, block: nn.Module, key: str | None = None, notes: Mapping[str, float] | None = None) -> nn.Module:
        return block

    def load_back(self, key: str, make_block: Callable[[], nn.Module]) -> nn.Module | None:
        return None

    def is_offloaded(self, key: str) -> bool:
        return False

    def notes(self, key: str) -> dict[str, float]:
        return {}

    def layer_keys(self, layer: int) -> list[str]:
        return []

    def fingerprint(self) -> str:
        return ""

    def tensor_storage(self) -> Storage:
        return Memory()

    def load_all(self) -> None:
        pass


def layer_store(model: PreTrainedModel) -> LayerStore:
    """Return the layer store of a model; the default is `InMemory`."""
    store: LayerStore = model.__dict__.setdefault(ATTRIBUTE, InMemory())
    return store


def set_layer_store(model: PreTrainedModel, store: LayerStore) -> None:
    """Set the layer store of a model."""
    model.__dict__[ATTRIBUTE] = store
