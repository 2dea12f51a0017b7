"""The processes of one run: their ranks, and the collectives between them. A single process needs no process group.

All processes run the same program and make the calls of this module in the same order. Work of only the
first process uses `run_on_first`, which forbids such calls inside.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import Enum
from functools import cache
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from recondense.errors import UserError

Value = TypeVar("Value")


class _Mode(Enum):
    """Whether the other processes take part in the collectives of this one."""

    TOGETHER = "every process makes the same calls"
    FIRST = "the first process works and the others wait for its result, so no collective is allowed"
    ALONE = "the first process works as if it were the only one"


# Module state, as torch.distributed's group is: both belong to the process.
_mode = _Mode.TOGETHER
_timeout: timedelta | None = None  # of this run's groups; None: torch's default


def has_group() -> bool:
    """Return whether there is a process group, even if it has one process."""
    assert _mode is not _Mode.FIRST, "the other processes are waiting for this one and cannot take part"
    return dist.is_available() and dist.is_initialized() and _mode is not _Mode.ALONE


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if has_group() else 1


def rank() -> int:
    """Return the rank of this process, from 0. Allowed inside `run_on_first`."""
    return 0 if _mode is not _Mode.TOGETHER or world_size() == 1 else dist.get_rank()


def is_first() -> bool:
    """Return whether this process writes the run's files and prints. Allowed inside `run_on_first`."""
    return rank() == 0


def local_world_size() -> int:
    """Return the number of processes on this machine, which is the same on every machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def take_share(items: Sequence[Value]) -> Sequence[Value]:
    """Return this process's share of some items: every world_size-th item, starting at its rank."""
    return items[rank() :: world_size()]


def barrier() -> None:
    """Wait until all processes have reached this call."""
    if world_size() > 1:
        gather(None)


def broadcast(value: Value | None) -> Value:
    """Send the first process's value to all processes; the values of the others are ignored."""
    if world_size() == 1:
        return value  # type: ignore[return-value]
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_group())
    return box[0]  # type: ignore[return-value]


def gather(value: Value) -> list[Value]:
    """Return the values of all processes on every process, in order of rank; plain data or CPU tensors."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_group())
    return values


def gather_to(to: int, value: Value) -> list[Value]:
    """Send the values of all processes to one of them, in order of rank; plain data or tensors.

    Args:
        to: the rank of the process that receives the values.
        value: this process's value.

    Returns:
        the values on process `to`, an empty list on the others.
    """
    values: list[Any] | None = [None] * world_size() if rank() == to else None
    dist.gather_object(value, values, dst=to, group=_group())
    return values or []


def mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the means of scalars over all processes, by name."""
    if world_size() == 1:
        return values
    stacked = torch.stack([value.float() for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, stacked / world_size(), strict=True))


def run_on_first(make: Callable[[], Value]) -> Value:
    """Run a function on the first process and return its result on all. The other processes wait.

    Args:
        make: may call `rank` and `is_first`. Calling `world_size` or any collective raises an AssertionError, even in a
            run of one process. Work that needs them, such as training, must use `work_alone`.
    """
    together = has_group() and dist.get_world_size() > 1
    result = None
    if is_first():
        with _in_mode(_Mode.FIRST):
            result = make()
    return broadcast(result) if together else result  # type: ignore[return-value]


def refuse(text: str) -> NoReturn:
    """Raise a UserError that all processes have come to; the first one prints it, and the others wait and end with it.

    Raises:
        UserError: always.
    """

    def fail() -> None:
        raise UserError(text)

    run_on_first(fail)
    raise AssertionError("the first process has failed")


@contextmanager
def work_alone() -> Iterator[None]:
    """Treat this process as the only one inside the context. Only allowed inside `run_on_first`."""
    assert _mode is not _Mode.TOGETHER or world_size() == 1, "the other processes are not waiting for this one"
    with _in_mode(_Mode.ALONE):
        yield


@contextmanager
def _in_mode(mode: _Mode) -> Iterator[None]:
    global _mode
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


@contextmanager
def let_first_go_ahead() -> Iterator[None]:
    """Let the first process finish the context before the others enter it, so that they use what it has downloaded."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def join_group(backend: str, timeout: timedelta, store: dist.Store | None = None) -> None:
    """Join the process group that the environment describes, with torchrun's variables.

    Args:
        backend: torch.distributed's name for it, such as "nccl" or "gloo".
        timeout: how long a process waits for the others in each call.
        store: where the processes exchange their addresses; None for one at the address of the environment.
    """
    global _timeout
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    _timeout = timeout


def leave_group() -> None:
    """Leave the process group."""
    global _timeout
    _timeout = None
    _group.cache_clear()
    deepspeed: Any = sys.modules.get("deepspeed.comm.comm")
    if deepspeed is not None:
        deepspeed.cdb = None  # else it would keep using the destroyed group
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first_to_start() -> bool:
    """Return whether this is the first process, by the launcher's variables; works before there is a group."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


class SharedMapping(MutableMapping[str, dict[str, Any]]):
    """A mapping on the first process that all processes read together; only the first one writes.

    Args:
        kept: the mapping; the one on the first process is used.
    """

    def __init__(self, kept: MutableMapping[str, dict[str, Any]]) -> None:
        self._kept = kept

    def __getitem__(self, key: str) -> dict[str, Any]:
        value: dict[str, Any] | None = broadcast(self._kept.get(key) if is_first() else None)
        if value is None:
            raise KeyError(key)
        return value

    def __setitem__(self, key: str, value: dict[str, Any]) -> None:
        if is_first():
            self._kept[key] = value

    def __delitem__(self, key: str) -> None:
        if is_first():
            del self._kept[key]

    def __iter__(self) -> Iterator[str]:
        return iter(broadcast(list(self._kept) if is_first() else None))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@cache
def _group() -> dist.ProcessGroup | None:
    """Return the gloo group for plain data, whatever backend the tensors use; None means the default group."""
    if dist.get_backend() == "gloo":
        return None
    # A new group does not inherit the timeout of the default one.
    return dist.new_group(backend="gloo", timeout=_timeout)  # type: ignore[return-value]


def collect(
    tensors: Iterable[Tensor], shapes: Sequence[Sequence[int]], dtype: torch.dtype, to: int
) -> Iterator[Tensor]:
    """Send the tensors of all processes to one of them; item i is on process i mod world_size (`take_share`).

    Args:
        tensors: this process's items, in order.
        shapes: the shapes of the items of all processes, in order.
        dtype: the dtype of all items.
        to: the rank of the process that receives them.

    Yields:
        all items in order on process `to`, nothing on the others; they must still exhaust the iterator.
    """
    local = iter(tensors)
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    for index, shape in enumerate(shapes):
        source = index % world_size()
        tensor = next(local) if source == rank() else None
        if rank() == to == source:
            assert tensor is not None
            yield tensor
        elif rank() == to:
            received = torch.empty(*shape, dtype=dtype, device=device)
            dist.recv(received.view(torch.uint8), source)
            yield received
        elif tensor is not None:
            assert list(tensor.shape) == list(shape) and tensor.dtype == dtype
            dist.send(tensor.to(device).contiguous().view(torch.uint8), to)
