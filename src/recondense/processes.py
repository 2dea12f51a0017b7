"""The processes of one run: which this is, and what they tell each other. A single one needs no process group.

All of them go the same way through the program and meet at each call here, in the same order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


_alone = False  # while the first works without the others
_timeout: timedelta | None = None  # of this run's groups; None: torch's own


def grouped() -> bool:
    """Whether there is a process group, be it of one process."""
    return dist.is_available() and dist.is_initialized() and not _alone


def world_size() -> int:
    """How many there are."""
    return dist.get_world_size() if grouped() else 1


def rank() -> int:
    """Which this one is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this one writes the run's files and prints."""
    return rank() == 0


def on_this_node() -> int:
    """How many there are on this machine; as many on each of the others."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def share(items: Sequence[Value]) -> Sequence[Value]:
    """Every world_size-th of some items, this process's."""
    return items[rank() :: world_size()]


def barrier() -> None:
    """Wait until all have come here."""
    if world_size() > 1:
        gather(None)


def broadcast(value: Value | None) -> Value:
    """What the first process has; the others' own is ignored."""
    if world_size() == 1:
        return value  # type: ignore[return-value]
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_group())
    return box[0]  # type: ignore[return-value]


def gather(value: Value) -> list[Value]:
    """What each process has, in the order of ranks, for all of them; plain data or CPU tensors."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group=_group())
    return found


def gather_on(to: int, value: Value) -> list[Value]:
    """What each process has, in the order of ranks, on one of them; empty on the others. Plain data or tensors."""
    found: list[Any] | None = [None] * world_size() if rank() == to else None
    dist.gather_object(value, found, dst=to, group=_group())
    return found or []


def mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The means over all processes of scalars."""
    if world_size() == 1:
        return values
    both = torch.stack([value.float() for value in values.values()])
    dist.all_reduce(both)
    return dict(zip(values, both / world_size(), strict=True))


def by_first(make: Callable[[], Value]) -> Value:
    """What the first process makes, for all. Inside it is alone, and may call what all call together; others wait."""
    if world_size() == 1:
        return make()
    made = None
    if is_first():
        with _working_alone():
            made = make()
    return broadcast(made)


@contextmanager
def first_before_others() -> Iterator[None]:
    """What the first does inside it has done when the others begin: they find its downloads."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


@contextmanager
def _working_alone() -> Iterator[None]:
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def begin(backend: str, timeout: timedelta) -> None:
    """Meet the others, by the environment that torchrun sets.

    Args:
        timeout: how long one waits for another in whatever they do together.
    """
    global _timeout
    dist.init_process_group(backend, timeout=timeout)
    _timeout = timeout


def end() -> None:
    """Leave the process group."""
    global _timeout
    _timeout = None
    _group.cache_clear()
    deepspeed: Any = sys.modules.get("deepspeed.comm.comm")
    if deepspeed is not None:
        deepspeed.cdb = None  # it would go on with the group that ended
    if dist.is_initialized():
        dist.destroy_process_group()


def first_to_start() -> bool:
    """Whether this is the first process, by what its launcher has set; there may be no group yet."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


class FirstProcess(MutableMapping[str, dict[str, Any]]):
    """A mapping that the first process keeps: all see what it holds, and only it writes."""

    def __init__(self, own: MutableMapping[str, dict[str, Any]]) -> None:
        self._own = own

    def __getitem__(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] | None = broadcast(self._own.get(key) if is_first() else None)
        if found is None:
            raise KeyError(key)
        return found

    def __setitem__(self, key: str, value: dict[str, Any]) -> None:
        if is_first():
            self._own[key] = value

    def __delitem__(self, key: str) -> None:
        if is_first():
            del self._own[key]

    def __iter__(self) -> Iterator[str]:
        return iter(broadcast(list(self._own) if is_first() else None))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@cache
def _group() -> dist.ProcessGroup | None:
    """Plain data goes over gloo whatever the tensors go over."""
    if dist.get_backend() == "gloo":
        return None
    # A new group does not take the timeout of the first.
    return dist.new_group(backend="gloo", timeout=_timeout)  # type: ignore[return-value]


def collect(own: Iterable[Tensor], shapes: Sequence[Sequence[int]], dtype: torch.dtype, to: int) -> Iterator[Tensor]:
    """Tensors of all processes, on one of them: item i lies with process i mod world_size, as `share` gives it.

    Args:
        own: of this process, in order.
        shapes: of all items.
        dtype: of all of them.
        to: who gets them; elsewhere nothing comes out, but all must go through it to the end.
    """
    tensors = iter(own)
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    for index, shape in enumerate(shapes):
        source = index % world_size()
        mine = next(tensors) if source == rank() else None
        if rank() == to == source:
            assert mine is not None
            yield mine
        elif rank() == to:
            received = torch.empty(*shape, dtype=dtype, device=device)
            dist.recv(received.view(torch.uint8), source)
            yield received
        elif mine is not None:
            assert list(mine.shape) == list(shape) and mine.dtype == dtype
            dist.send(mine.to(device).contiguous().view(torch.uint8), to)
