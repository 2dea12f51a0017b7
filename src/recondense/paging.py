"""Decoder layers whose weights are in memory only while they are used; of a model that is whole, all always are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def resident(model: PreTrainedModel, layer: int) -> Iterator[None]:
    """Inside, a decoder layer has its weights."""
    yield


def put_away(model: PreTrainedModel, block: nn.Module) -> nn.Module:
    """A block of one's own that stands in a layer later; its weights are in memory only while that layer is used."""
    return block
