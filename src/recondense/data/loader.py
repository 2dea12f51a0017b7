"""Batches of windows, in the order in which training and validation see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from recondense import processes
from recondense.data.labels import target_mask
from recondense.errors import UserError

# Columns with one row per window: input_ids (N, S), and whatever else the model or the loss needs.
Table = Mapping[str, Tensor]


def to_table(windows: Tensor | Table) -> Table:
    """Return windows as a table; a tensor of ids (N, S) becomes its only column."""
    return {"input_ids": windows} if isinstance(windows, Tensor) else windows


def num_rows(table: Table) -> int:
    """Return the number of windows, N."""
    return len(table["input_ids"])


class Windows:
    """Batches of windows, in order; the last batch may be smaller.

    If there are several processes, each takes its part of every batch. If the last batch has no part for a process,
    that process gets a window marked `idle`, so that all processes do the same work.
    """

    def __init__(self, windows: Tensor | Table, batch_size: int) -> None:
        self.table = to_table(windows)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-num_rows(self.table) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, num_rows(self.table), self.batch_size):
            rows = _rows_of_this_process(range(start, min(start + self.batch_size, num_rows(self.table))))
            batch = {name: column[rows or [0]] for name, column in self.table.items()}
            yield batch if rows else {**batch, "idle": torch.ones(())}


def _rows_of_this_process(rows: Sequence[int]) -> list[int]:
    size = -(-len(rows) // processes.world_size())
    return list(rows[processes.rank() * size : (processes.rank() + 1) * size])


class ShuffledWindows:
    """`num_batches` batches in a shuffled order that depends only on the seed and the position.

    Sample i is window permutation_e[i mod N] of epoch e = i div N; permutation_e is seeded by (seed, e). A batch may
    cross the end of an epoch. The state is the position of the next batch.

    Args:
        table: the windows.
        batch_size: windows per batch, over all processes.
        num_batches: number of batches.
        seed: the seed of the order.
        in_flight: returns the number of batches that were taken but not yet trained on. A state that is saved in the
            middle of a step does not count them, so that they are repeated.
        accumulate: batches per optimizer step.
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
        # All batches, even after a resume: Lightning adds the completed batches to those that it fetches.
        return self.num_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        end = (self.position // self.num_batches + 1) * self.num_batches
        while self.position < end:
            batch = self.batch(self.position)
            self.position += 1
            yield batch

    def batch(self, position: int) -> dict[str, Tensor]:
        """Return this process's part of the batch at a position, counted from 0.

        With labels, the parts of an optimizer step have different numbers of targets; `weight` is then the weight of
        this part.
        """
        rows = _rows_of_this_process(self._rows(position, position + 1))
        batch = {name: column[rows] for name, column in self.table.items()}
        if "labels" in self.table and (processes.world_size() > 1 or self.accumulate > 1):
            batch["weight"] = self._weight(position, rows)
        return batch

    def _weight(self, position: int, rows: Sequence[int]) -> Tensor:
        """Return the numbers of targets that give a part its weight (3,), int64; see `RecoveryModule.losses`."""
        in_epoch = position % self.num_batches
        first = position - in_epoch % self.accumulate
        end = min(first + self.accumulate, position - in_epoch + self.num_batches)  # the end of an epoch ends a step
        part, batch, step = (
            target_mask(self.table["labels"][indices]).sum()
            for indices in (rows, self._rows(position, position + 1), self._rows(first, end))
        )
        batches = end - first
        return torch.stack([part * processes.world_size() * batches, batch * batches, step.clamp_min(1)])

    def rows(self, position: int) -> list[int]:
        """Return the indices of the windows of the whole batch at a position, over all processes."""
        return self._rows(position, position + 1)

    def used_windows(self) -> list[int]:
        """Return the indices of the windows that occur in a batch, ascending."""
        samples = min(self.batch_size * self.num_batches, num_rows(self.table))  # an epoch has each window once
        return sorted(self._window_index(sample) for sample in range(samples))

    def _rows(self, first: int, end: int) -> list[int]:
        """Return the indices of the windows of the batches at positions `first` to `end - 1`."""
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
    """Training windows in a shuffled order that resumes exactly, and validation windows in order.

    Lightning keeps the loader's position in its checkpoints and restores it before the first batch.

    Args:
        train: training windows: ids (N, S), or a table with labels and positions.
        validation: validation windows; None for no validation (then give the Trainer limit_val_batches=0).
        batch_size: windows per batch, over all processes.
        num_batches: batches per fit (optimizer steps × accumulated batches); windows repeat as often as needed.
        seed: the seed of the order.

    Raises:
        UserError: there is no training window.
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
        self.train_table = to_table(train)
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
        """Return the number of batches that the trainer has taken but not trained on: 1 within a step, else 0."""
        if self.trainer is None:
            return 0
        current: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(current.ready - current.processed)
