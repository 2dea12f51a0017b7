"""Traces: the inputs and outputs of MoE blocks, and the outputs of their routers.

Legend: T tokens, D hidden size, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from recondense.calibration.text_batches import TextBatch
from recondense.models import moe_blocks
from recondense.models.tensor_store import Storage


@dataclass(frozen=True)
class LayerTrace:
    """The input and output of one MoE block on one batch of texts: real tokens only, in text order.

    Args:
        x_TD: the input of the MoE block, after the norm.
        output_TD: the output of the MoE block, without the residual.
        top_k_index_TK: the experts that the router selected.
        top_k_weights_TK: their routing weights.
    """

    x_TD: Tensor
    output_TD: Tensor
    top_k_index_TK: Tensor
    top_k_weights_TK: Tensor

    @classmethod
    def from_call(cls, call: Mapping[str, Any], batch: TextBatch) -> LayerTrace:
        """Make a trace from a call on padded texts that `record_calls` has recorded.

        Args:
            call: `x` and `output` (B, S, D) of the block, and the return value of its `router`.
            batch: the texts of the call.
        """
        _, weights, selected = call["router"]
        real_tokens = batch.mask_BS.flatten()
        return cls(
            x_TD=call["x"][batch.mask_BS],
            output_TD=call["output"][batch.mask_BS],
            top_k_index_TK=selected.reshape(len(real_tokens), -1)[real_tokens],
            top_k_weights_TK=weights.reshape(len(real_tokens), -1)[real_tokens],
        )

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values())


class Traces(Sequence[LayerTrace]):
    """The traces of one layer, one per batch, in a storage."""

    def __init__(self, storage: Storage) -> None:
        self._lists = [storage.tensor_list() for _ in LayerTrace.__dataclass_fields__]

    def append(self, trace: LayerTrace) -> None:
        for tensors, tensor in zip(self._lists, vars(trace).values(), strict=True):
            tensors.append(tensor)

    def __len__(self) -> int:
        return len(self._lists[0])

    def __getitem__(self, index: Any) -> Any:
        return LayerTrace(*(tensors[index] for tensors in self._lists))


@contextmanager
def record_calls(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, dict[str, Any]]]:
    """Record the last call of these layers' blocks and routers inside the context.

    Yields:
        The last call of each layer: `x` and `output` of its block, and the return value of its `router`.
    """
    calls: dict[int, dict[str, Any]] = {layer: {} for layer in layers}
    handles = []
    for layer, call in calls.items():
        sparse = moe_blocks.sparse_blocks(model)[layer]

        def keep(module: nn.Module, args: Any, output: Any, call: dict[str, Any] = call) -> None:
            call.update(x=args[0], output=moe_blocks.block_output(output))

        def keep_router(module: nn.Module, args: Any, output: Any, call: dict[str, Any] = call) -> None:
            call.update(router=output)

        handles += [sparse.module.register_forward_hook(keep), sparse.router.register_forward_hook(keep_router)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
