"""Where the teacher's predictions come from: here, the uncompressed model on a backbone shared with the student."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

from torch import nn
from transformers import PreTrainedModel

from recondense import families


class SharedBackboneTeacher(nn.Module):
    """The original model, which shares with the student every weight that surgery left alone.

    Attention, norms, embeddings, head and untouched layers exist once; only the original blocks of changed layers are
    kept beside the student. Inside `active()` the student's module *is* the original.

    Args:
        model: the student.
        originals: the blocks that surgery took out, by decoder-layer index; frozen here.
    """

    def __init__(self, model: PreTrainedModel, originals: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(layer): block for layer, block in originals.items()}).requires_grad_(False)
        self._model = (model,)  # in a tuple, so that the student is not registered a second time

    def active(self) -> AbstractContextManager[PreTrainedModel]:
        """A context inside which the model computes what the original does."""
        return families.swapped(self._model[0], {int(layer): block for layer, block in self.blocks.items()})
