"""The calibration texts in batches, which processes can divide among them, and reductions over them in text order.

Batches have a fixed number of texts, so that results depend neither on memory nor on the number of processes.

Legend: B texts of a batch, S their padded length, C candidates, T real tokens of a batch (without padding).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from recondense import processes

TOTAL_BYTES = 1 << 25  # the most bytes that a process sends at a time in `TextBatches.total`

Value = TypeVar("Value")


@dataclass(frozen=True)
class TextBatch:
    """A few calibration texts, padded on the right, so that with causal attention no real token sees padding."""

    input_ids_BS: Tensor
    mask_BS: Tensor

    @property
    def lengths_B(self) -> Tensor:
        return self.mask_BS.sum(dim=1)


class TextBatches:
    """All batches of texts, and those of this process.

    Args:
        batches: all batches, the same on every process.
        split: deal the batches out to the processes in turn; otherwise each process has all of them.

    Attributes:
        all: all batches.
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
        """Return the values of all processes that share the texts, in order of rank; plain data or CPU tensors."""
        return processes.gather(value) if self.split else [value]

    def interleave(self, shares: Sequence[Sequence[Value]]) -> list[Value]:
        """Merge lists with one value per local batch of each process into one list, in text order."""
        return [shares[index % len(shares)][index // len(shares)] for index in range(len(self.all))]

    def in_order(self, values: Sequence[Value]) -> list[Value]:
        """Return the values of all batches in text order, from one value per local batch; plain data or tensors."""
        if not self.split:
            return list(values)
        return self.interleave(self.gather([value.cpu() if isinstance(value, Tensor) else value for value in values]))  # type: ignore[misc]

    def total(self, values: Iterable[Tensor]) -> Tensor:
        """Sum over all batches in text order, from one value per local batch; the sum is on the CPU."""
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
        """Average over the tokens of each text, then over the texts, so that each text has the same weight.

        Args:
            values_CT: one tensor (candidates, real tokens) per local batch.

        Returns:
            The means (C,) in fp64.
        """
        per_text = [
            torch.segment_reduce(values.double().T.contiguous(), "mean", lengths=batch.lengths_B, axis=0)
            for values, batch in zip(values_CT, self.local, strict=True)
        ]
        return torch.cat(self.in_order(per_text)).mean(dim=0)
