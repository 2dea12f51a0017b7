"""Where the teacher's predictions come from: here, the uncompressed model on a backbone shared with the student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

from torch import nn
from transformers import PreTrainedModel

from recondense import families
from recondense.adapters import Adapters


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
        self.adapters: Adapters | None = None  # the student's, off while the teacher is asked
        self._kept: list[tuple[nn.Module, str, nn.Parameter]] = []

    def keep(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Go on using a weight of the shared backbone that the student has replaced by another."""
        self._kept.append((module, name, parameter))

    def kept(self) -> list[nn.Parameter]:
        """The weights that `keep` was told of."""
        return [parameter for _, _, parameter in self._kept]

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """A context inside which the model computes what the original does."""
        model = self._model[0]
        off = self.adapters.disabled() if self.adapters is not None else nullcontext()
        own = [(module, name, module._parameters[name]) for module, name, _ in self._kept]
        with off, families.swapped(model, {int(layer): block for layer, block in self.blocks.items()}):
            for module, name, original in self._kept:
                module._parameters[name] = original
            try:
                yield model
            finally:
                for module, name, parameter in own:
                    module._parameters[name] = parameter
