"""Where the weights of a model's decoder layers are: in memory, or on disk until a layer is used.

Every model has one layer store; callers ask for it: `layer_store(model).resident(layer)`.
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
    """Where the weights of a model's decoder layers are.

    Attributes:
        streamed: whether a layer's weights are read from disk when the layer is used.
        context: what blocks depend on besides the plan: the model's weights and the calibration set. A store does not
            load back what another context offloaded.
    """

    streamed: bool
    context: str

    def resident(self, layer: int) -> AbstractContextManager[None]:
        """Inside, the weights of one decoder layer are in memory, with the block that is in it now."""
        ...

    def offload(self, block: nn.Module, key: str | None = None, notes: Mapping[str, float] | None = None) -> nn.Module:
        """Write a block's weights to disk, to be read whenever its layer is used.

        Args:
            key: the file stays under this name; None: the file is deleted with the block.
            notes: a few numbers to keep with the weights.

        Returns:
            a block that computes the same; the given one if the model is in memory.
        """
        ...

    def load_back(self, key: str, make_block: Callable[[], nn.Module]) -> nn.Module | None:
        """The block that this process or an earlier one offloaded under a key; None if there is none.

        Args:
            make_block: makes a block of its shape, with any weights or none.
        """
        ...

    def is_offloaded(self, key: str) -> bool:
        """Whether `load_back` has a block for this key."""
        ...

    def notes(self, key: str) -> dict[str, float]:
        """The numbers that were kept with a block; empty if there are none."""
        ...

    def layer_keys(self, layer: int) -> list[str]:
        """The keys of a decoder layer and of its block; empty text for weights of the checkpoint."""
        ...

    def fingerprint(self) -> str:
        """A fingerprint of the context and of the keys of all layers; empty if the model is in memory."""
        ...

    def tensor_storage(self) -> Storage:
        """Where hidden states of a pass through the whole model go."""
        ...

    def load_all(self) -> None:
        """Load every layer for good, and freeze the model; its store is `InMemory` from then on."""
        ...


class InMemory:
    """The store of a model whose weights are all in memory: there is nothing to load or to keep."""

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
    """The layer store of a model; a model that was not loaded with another one is in memory."""
    store: LayerStore = model.__dict__.setdefault(ATTRIBUTE, InMemory())
    return store


def set_layer_store(model: PreTrainedModel, store: LayerStore) -> None:
    """Give a model another layer store."""
    model.__dict__[ATTRIBUTE] = store
