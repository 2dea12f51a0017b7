"""Turns of a process of training.py: it trains a few steps when it is told to, and reports its speed and memory."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from resident_memory import peak_bytes, reset_peak

from recondense.evaluation.profiling import peak_tensor_bytes


def tensor_bytes() -> int:
    """Bytes of all tensors of this process; storage that tensors share counts once."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)  # not subclasses: those of torch.compile have no memory
    tensors = [value for value in gc.get_objects() if type(value) in kinds and value.device.type == "cpu"]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({(storage := tensor.untyped_storage()).data_ptr(): storage.nbytes() for tensor in tensors}.values())


class Turns:
    """Lets a process train its steps in turns, and reports every turn.

    Args:
        connection: to the process that gives the turns. It sends the number of steps of a turn, and 0 at the end.
        imported: bytes that were resident after the imports.
    """

    def __init__(self, connection: Any, imported: int) -> None:
        self.connection = connection
        self.imported = imported
        self.remaining = 0
        self.tokens = 0
        self.losses: list[float] = []
        self.facts: dict[str, Any] = {}
        self.one_more: Callable[[], Any] | None = None  # forward and backward of a step
        self._started: float | None = None
        self._cpu = 0.0

    def start_step(self) -> None:
        """Wait for a turn if this one is over; to be called before every step."""
        if self.remaining == 0:
            now = time.perf_counter()
            if self._started is not None:
                self.connection.send((now - self._started, time.process_time() - self._cpu, self.tokens))
            else:
                reset_peak()
                self.connection.send(None)
            try:
                self.remaining = self.connection.recv()
            except EOFError:  # the process that gives the turns has ended
                os._exit(1)
            if self.remaining == 0:
                self._end()
            self.tokens, self._started, self._cpu = 0, time.perf_counter(), time.process_time()
        self.remaining -= 1

    def _end(self) -> None:
        """Report memory, facts and losses, and end the process."""
        peak = peak_bytes()
        memory = {"peak_bytes": peak, "peak_bytes_over_imports": peak - self.imported, "imports_bytes": self.imported}
        assert self.one_more is not None
        alive = tensor_bytes()
        step = peak_tensor_bytes(self.one_more, "cpu")
        self.facts |= {"alive_bytes": alive, "step_bytes": step, "tensor_bytes": alive + step}
        self.connection.send({**memory, **self.facts, "losses": self.losses})
        os._exit(0)


class LightningTurns(L.Callback):
    """Turns of a recovery of recondense."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.turns.start_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.turns.losses.append(float(outputs["loss"]))
        self.turns.tokens += batch["input_ids"].numel()
