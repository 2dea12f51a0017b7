"""What one MoE block saw and gave.

Legend: T tokens, D hidden size, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense.models import views
from recondense.models.tensor_store import Storage


@dataclass(frozen=True)
class TextBlock:
    """A few calibration texts, padded on the right: with causal attention no real token sees a pad."""

    input_ids_BS: Tensor
    mask_BS: Tensor

    @property
    def lengths_B(self) -> Tensor:
        return self.mask_BS.sum(dim=1)


@dataclass(frozen=True)
class LayerTrace:
    """What one sparse MoE layer saw and gave for one block; real tokens only, in text order.

    Args:
        x_TD: input of the MoE layer (after its norm).
        output_TD: output of the original MoE layer, without the residual.
        top_k_index_TK, top_k_weights_TK: what the router returned.
    """

    x_TD: Tensor
    output_TD: Tensor
    top_k_index_TK: Tensor
    top_k_weights_TK: Tensor

    @classmethod
    def of(cls, seen: Mapping[str, Any], block: TextBlock) -> LayerTrace:
        """From what hooks caught (x and output (B, S, D), the router's output) to real tokens."""
        _, weights, chosen = seen["router"]
        real = block.mask_BS.flatten()
        return cls(
            x_TD=seen["x"][block.mask_BS],
            output_TD=seen["output"][block.mask_BS],
            top_k_index_TK=chosen.reshape(real.numel(), -1)[real],
            top_k_weights_TK=weights.reshape(real.numel(), -1)[real],
        )

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values())


class Traces(Sequence[LayerTrace]):
    """The traces of one layer, block by block, on shelves."""

    def __init__(self, storage: Storage) -> None:
        self._shelves = [storage.shelf() for _ in LayerTrace.__dataclass_fields__]

    def append(self, trace: LayerTrace) -> None:
        for shelf, tensor in zip(self._shelves, vars(trace).values(), strict=True):
            shelf.append(tensor)

    def __len__(self) -> int:
        return len(self._shelves[0])

    def __getitem__(self, index: Any) -> Any:
        return LayerTrace(*(shelf[index] for shelf in self._shelves))


@contextmanager
def tracing(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, dict[str, Any]]]:
    """Inside, each forward leaves here what these sparse layers and their routers got and gave."""
    seen: dict[int, dict[str, Any]] = {layer: {} for layer in layers}
    handles = []
    for layer, found in seen.items():
        sparse = views.sparse_blocks(model)[layer]

        def keep(module: nn.Module, args: Any, output: Any, found: dict[str, Any] = found) -> None:
            found.update(x=args[0], output=views.output_of(output))

        def keep_router(module: nn.Module, args: Any, output: Any, found: dict[str, Any] = found) -> None:
            found.update(router=output)

        handles += [sparse.module.register_forward_hook(keep), sparse.router.register_forward_hook(keep_router)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
