"""Windows in the order in which training sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from recondense import processes
from recondense.data.labels import predicting
from recondense.errors import UserError


def require_samples(texts: Sequence[str], num_samples: int) -> None:
    """Raises a UserError where there are fewer calibration texts than `data.calibration.num_samples`."""
    if len(texts) < num_samples:
        raise UserError(
            f"data.calibration.num_samples={num_samples}: there are {len(texts)} calibration texts; lower it or give "
            "more texts."
        )


Table = Mapping[str, Tensor]  # of equally many rows: input_ids (N, S), and what else a model or a loss needs of each


def table_of(windows: Tensor | Table) -> Table:
    """Windows of ids alone (N, S), or with labels and positions."""
    return {"input_ids": windows} if isinstance(windows, Tensor) else windows


def num_rows(table: Table) -> int:
    return len(table["input_ids"])


class Windows:
    """Windows in batches, in their order; the last batch may be smaller.

    Of several processes each has its part of every batch. One that has none of the last is given a window with the mark
    `idle`, so that all do the same.
    """

    def __init__(self, windows: Tensor | Table, batch_size: int) -> None:
        self.table = table_of(windows)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-num_rows(self.table) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, num_rows(self.table), self.batch_size):
            rows = _own_rows(range(start, min(start + self.batch_size, num_rows(self.table))))
            batch = {name: column[rows or [0]] for name, column in self.table.items()}
            yield batch if rows else {**batch, "idle": torch.ones(())}


def _own_rows(rows: Sequence[int]) -> list[int]:
    """This process's part of a batch."""
    size = -(-len(rows) // processes.world_size())
    return list(rows[processes.rank() * size : (processes.rank() + 1) * size])


class ShuffledWindows:
    """`num_batches` batches in a shuffled order that is a function of (seed, position) alone.

    Sample i is window permutation_e[i mod N] of epoch e = i div N, where permutation_e is seeded by (seed, e); batches
    run across the ends of epochs. The state is the position: it moves on as batches are taken, and `in_flight` tells
    how many of those taken have not been trained on, so that a state saved in the middle of a step repeats that step.

    Args:
        accumulate: batches of an optimiser step.
    """

    def __init__(
        self,
        table: Table,
        batch_size: int,
        num_batches: int,
        seed: int,
        in_flight: Callable[[], int],
        accumulate: int = 1,
    ) -> None:
        self.table = table
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.accumulate = accumulate
        self.position = 0
        self._in_flight = in_flight
        self._permutation: tuple[int, np.ndarray[Any, np.dtype[np.int64]]] | None = None

    def __len__(self) -> int:
        # The whole count also after a resume: Lightning adds the batches that were done to those it fetches.
        return self.num_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        end = (self.position // self.num_batches + 1) * self.num_batches
        while self.position < end:
            batch = self.batch(self.position)
            self.position += 1
            yield batch

    def batch(self, position: int) -> dict[str, Tensor]:
        """The batch at a position, counted from 0; of several processes each has its part of it.

        Where labels make the parts of an optimiser step different in size, `weight` says what this one weighs.
        """
        rows = _own_rows(self._rows(position, position + 1))
        batch = {name: column[rows] for name, column in self.table.items()}
        if "labels" in self.table and (processes.world_size() > 1 or self.accumulate > 1):
            batch["weight"] = self._weight(position, rows)
        return batch

    def _weight(self, position: int, rows: Sequence[int]) -> Tensor:
        """The tokens that some rows of a batch predict, as `RecoveryModule.losses` takes them, (3,) int64."""
        in_epoch = position % self.num_batches
        first = position - in_epoch % self.accumulate
        end = min(first + self.accumulate, position - in_epoch + self.num_batches)  # an epoch ends its last step
        part, batch, step = (
            predicting(self.table["labels"][some]).sum()
            for some in (rows, self._rows(position, position + 1), self._rows(first, end))
        )
        batches = end - first
        return torch.stack([part * processes.world_size() * batches, batch * batches, step.clamp_min(1)])

    def used(self) -> list[int]:
        """The windows that some batch holds, ascending."""
        samples = min(self.batch_size * self.num_batches, num_rows(self.table))  # an epoch holds each once
        return sorted(self._window_index(sample) for sample in range(samples))

    def _rows(self, first: int, end: int) -> list[int]:
        """The windows of the batches at some positions."""
        return [self._window_index(sample) for sample in range(first * self.batch_size, end * self.batch_size)]

    def _window_index(self, sample: int) -> int:
        epoch, index = divmod(sample, num_rows(self.table))
        if self._permutation is None or self._permutation[0] != epoch:
            self._permutation = epoch, np.random.default_rng([self.seed, epoch]).permutation(num_rows(self.table))
        return int(self._permutation[1][index])

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position - self._in_flight()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = int(state["position"])


class RecoveryData(LightningDataModule):
    """Training windows in a shuffled order that resumes exactly, and validation windows in theirs.

    Lightning keeps the loader's position in its checkpoints and hands it back before the first batch.

    Args:
        train: training windows: ids (N, S), or a table with their labels and positions.
        validation: validation windows; None: no validation (give the Trainer limit_val_batches=0).
        batch_size: windows of a batch.
        num_batches: batches of one fit (optimiser steps × accumulated batches); windows repeat as often as needed.
        seed: of the order.

    Raises:
        UserError: no training window.
    """

    def __init__(
        self,
        train: Tensor | Table,
        validation: Tensor | Table | None,
        batch_size: int,
        num_batches: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.train_table = table_of(train)
        if num_rows(self.train_table) == 0:
            raise UserError("recovery: there is no training window; give more training text.")
        self.validation = validation
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed

    def train_dataloader(self) -> ShuffledWindows:
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return ShuffledWindows(
            self.train_table, self.batch_size, self.num_batches, self.seed, self._in_flight, accumulate
        )

    def val_dataloader(self) -> Windows | list[Any]:
        return [] if self.validation is None else Windows(self.validation, self.batch_size)

    def _in_flight(self) -> int:
        """How many batches the trainer has taken but not worked off (1 in the middle of a step, else 0)."""
        if self.trainer is None:
            return 0
        current: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(current.ready - current.processed)
