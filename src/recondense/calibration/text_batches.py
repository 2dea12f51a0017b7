"""The calibration texts in batches, which processes may share, and reductions over them in text order.

Batches have a fixed number of texts, so that results depend neither on memory nor on the number of processes.

Legend: B texts of a batch, S their padded length, C candidates, T real tokens of a batch (padding left out).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from recondense import processes

TOTAL_BYTES = 1 << 25  # of what a process sends at a time for a total

Value = TypeVar("Value")


@dataclass(frozen=True)
class TextBatch:
    """A few calibration texts, padded on the right: with causal attention no real token sees a pad."""

    input_ids_BS: Tensor
    mask_BS: Tensor

    @property
    def lengths_B(self) -> Tensor:
        return self.mask_BS.sum(dim=1)


class TextBatches:
    """All batches of texts, and those of this process.

    Args:
        batches: all of them, the same on every process.
        split: the processes share the batches in turn; otherwise each process has all of them.

    Attributes:
        local: the batches of this process.
    """

    def __init__(self, batches: Iterable[TextBatch], split: bool = False) -> None:
        self.all = list(batches)
        self.split = split and processes.world_size() > 1
        self.local = list(processes.take_share(self.all)) if self.split else self.all

    @property
    def num_tokens(self) -> int:
        """Real tokens of all batches."""
        return sum(int(batch.mask_BS.sum()) for batch in self.all)

    @property
    def device(self) -> torch.device:
        return self.all[0].input_ids_BS.device

    def gather(self, value: Value) -> list[Value]:
        """The value of every process that shares the texts, in the order of ranks; plain data or CPU tensors."""
        return processes.gather(value) if self.split else [value]

    def interleave(self, shares: Sequence[Sequence[Value]]) -> list[Value]:
        """From one value a batch of every process to one a batch, in text order."""
        return [shares[index % len(shares)][index // len(shares)] for index in range(len(self.all))]

    def in_order(self, values: Sequence[Value]) -> list[Value]:
        """From one value a local batch to one a batch, in text order; plain data or tensors."""
        if not self.split:
            return list(values)
        return self.interleave(self.gather([value.cpu() if isinstance(value, Tensor) else value for value in values]))  # type: ignore[misc]

    def total(self, values: Iterable[Tensor]) -> Tensor:
        """The sum over all batches in text order, from one value a local batch; on the CPU."""
        on_cpu = (value.cpu() for value in values)
        first = next(on_cpu, None)
        size = 0 if first is None else first.nbytes
        at_once = max(1, TOTAL_BYTES // max(1, *self.gather(size)))
        rest = chain([] if first is None else [first], on_cpu)
        total: Tensor | None = None
        for _ in range(0, len(self.all), at_once * (processes.world_size() if self.split else 1)):
            for row in zip_longest(*self.gather(list(islice(rest, at_once)))):
                for value in row:
                    if value is not None:
                        total = value if total is None else total + value
        assert total is not None
        return total

    def mean_over_texts(self, values_CT: Iterable[Tensor]) -> Tensor:
        """The mean over texts of the mean over a text's tokens: each text weighs the same.

        Args:
            values_CT: one tensor a local batch, (candidates, real tokens).

        Returns:
            (C,) in fp64.
        """
        per_text = [
            torch.segment_reduce(values.double().T.contiguous(), "mean", lengths=batch.lengths_B, axis=0)
            for values, batch in zip(values_CT, self.local, strict=True)
        ]
        return torch.cat(self.in_order(per_text)).mean(dim=0)
