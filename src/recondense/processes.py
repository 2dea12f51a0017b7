"""The processes of one run: which one this is, and what they tell each other. A single one needs no process group.

All processes go the same way through the program and meet at each call here, in the same order. What the first one does
without the others goes through `run_on_first`, which forbids such calls inside.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import Enum
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


class _Mode(Enum):
    """How this process stands to the others now."""

    TOGETHER = "every process comes to the same calls"
    FIRST = "the first works and the others wait for its result, so that no call may need them"
    ALONE = "the first works as a run of one process does"


# torch.distributed's group belongs to the process, and so does how the process stands to it.
_mode = _Mode.TOGETHER
_timeout: timedelta | None = None  # of this run's groups; None: torch's own


def has_group() -> bool:
    """Whether there is a process group, even if it has one process."""
    assert _mode is not _Mode.FIRST, "the other processes wait for this one, and cannot take part"
    return dist.is_available() and dist.is_initialized() and _mode is not _Mode.ALONE


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if has_group() else 1


def rank() -> int:
    """The number of this process, from 0. `run_on_first` allows this question."""
    return 0 if _mode is not _Mode.TOGETHER or world_size() == 1 else dist.get_rank()


def is_first() -> bool:
    """Whether this process writes the run's files and prints. `run_on_first` allows this question."""
    return rank() == 0


def local_world_size() -> int:
    """The number of processes on this machine, which is the same on every machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def take_share(items: Sequence[Value]) -> Sequence[Value]:
    """Take this process's share of some items: every world_size-th, from the rank on."""
    return items[rank() :: world_size()]


def barrier() -> None:
    """Wait until all processes have come here."""
    if world_size() > 1:
        gather(None)


def broadcast(value: Value | None) -> Value:
    """Give all processes the first one's value; the others' values are ignored."""
    if world_size() == 1:
        return value  # type: ignore[return-value]
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_group())
    return box[0]  # type: ignore[return-value]


def gather(value: Value) -> list[Value]:
    """Give all processes the values of all, in the order of ranks; plain data or CPU tensors."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_group())
    return values


def gather_to(to: int, value: Value) -> list[Value]:
    """Give one process the values of all, in the order of ranks; plain data or tensors.

    Returns:
        the values on process `to`, an empty list on the others.
    """
    values: list[Any] | None = [None] * world_size() if rank() == to else None
    dist.gather_object(value, values, dst=to, group=_group())
    return values or []


def mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The means of scalars over all processes, by name."""
    if world_size() == 1:
        return values
    stacked = torch.stack([value.float() for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, stacked / world_size(), strict=True))


def run_on_first(make: Callable[[], Value]) -> Value:
    """Run a function on the first process, and give its result to all. The others wait.

    Args:
        make: may ask for `rank` and `is_first`. It may not ask for the number of processes or call what they call
            together: that is an AssertionError, also in a run of one process. Work that does so, such as a training,
            goes into `work_alone`.
    """
    together = has_group() and dist.get_world_size() > 1
    made = None
    if is_first():
        with _in_mode(_Mode.FIRST):
            made = make()
    return broadcast(made) if together else made  # type: ignore[return-value]


@contextmanager
def work_alone() -> Iterator[None]:
    """Inside, this process is a run of one: collectives need no other. Only within `run_on_first`."""
    assert _mode is not _Mode.TOGETHER or world_size() == 1, "the other processes do not wait for this one"
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
    """The first process goes through this before the others begin, so that they use what it has downloaded."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def join_group(backend: str, timeout: timedelta) -> None:
    """Join the process group that the environment describes, with torchrun's variables.

    Args:
        backend: torch.distributed's name of it.
        timeout: how long a process waits for another in each call.
    """
    global _timeout
    dist.init_process_group(backend, timeout=timeout)
    _timeout = timeout


def leave_group() -> None:
    """Leave the process group."""
    global _timeout
    _timeout = None
    _group.cache_clear()
    deepspeed: Any = sys.modules.get("deepspeed.comm.comm")
    if deepspeed is not None:
        deepspeed.cdb = None  # it would use the group that ended
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first_to_start() -> bool:
    """Whether this is the first process, by the launcher's variables; there may be no group yet."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


class SharedMapping(MutableMapping[str, dict[str, Any]]):
    """A mapping that the first process keeps: all processes read it together, and only the first one writes.

    Args:
        kept: the mapping, which counts on the first process alone.
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
    """The group for plain data, which goes over gloo whatever the tensors go over; None: the default group."""
    if dist.get_backend() == "gloo":
        return None
    # A new group does not take the timeout of the first.
    return dist.new_group(backend="gloo", timeout=_timeout)  # type: ignore[return-value]


def collect(
    tensors: Iterable[Tensor], shapes: Sequence[Sequence[int]], dtype: torch.dtype, to: int
) -> Iterator[Tensor]:
    """Send the tensors of all processes to one of them; item i lies on process i mod world_size (`take_share`).

    Args:
        tensors: this process's items, in order.
        shapes: of all items.
        dtype: of all items.
        to: the process that receives them. The others receive nothing, but must go through the iterator to its end.
    """
    mine = iter(tensors)
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    for index, shape in enumerate(shapes):
        source = index % world_size()
        tensor = next(mine) if source == rank() else None
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
