"""All uses of lm-eval beyond its documented functions; docs/private_apis.md lists the names."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from recondense.progress import ProgressBar

MODULES_WITH_BARS = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")
NO_PROCESSES = "DISABLE_MULTIPROC"


def check_yaml(path: Path) -> None:
    """Read a task file like lm-eval's index, but raise the errors that the index ignores."""
    from lm_eval.tasks._yaml_loader import load_yaml

    load_yaml(path, resolve_func=False)


def task_settings(manager: Any, task: str) -> dict[str, Any]:
    """Return the settings in a task's file; empty for a task without a file."""
    return manager.task_index[task].cfg or {}


def tasks_of_tag(manager: Any, name: str) -> list[str] | None:
    """Return the tasks of a tag, sorted; None if the name is not a tag."""
    entry = manager.task_index[name]
    return sorted(entry.tags) if entry.kind.name == "TAG" else None


def check_encoded(lm: Any, check: Callable[[int], None]) -> None:
    """Let a model of lm-eval pass the largest id of whatever it tokenizes to a function, before it computes with it."""
    encode, encode_batch = lm.tok_encode, lm.tok_batch_encode

    def checked(*args: Any, **kwargs: Any) -> list[int]:
        ids: list[int] = encode(*args, **kwargs)
        check(max(ids, default=0))
        return ids

    def checked_batch(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        ids_BS, mask_BS = encode_batch(*args, **kwargs)
        check(int(ids_BS.max()) if ids_BS.numel() else 0)
        return ids_BS, mask_BS

    lm.tok_encode, lm.tok_batch_encode = checked, checked_batch


@contextmanager
def requests_shown(bar: ProgressBar) -> Iterator[None]:
    """Replace lm-eval's bars by `bar`, which counts model requests, and keep lm-eval from starting processes."""
    requests = _Requests(bar)
    with ExitStack() as stack:
        for name in MODULES_WITH_BARS:
            stack.enter_context(_attribute(importlib.import_module(name), "tqdm", requests))
        stack.enter_context(_variable(NO_PROCESSES, "1"))  # a process per core would compete with torch's threads
        yield


class _Requests:
    """A replacement for tqdm in lm-eval. It counts model requests; loops over other things show nothing."""

    def __init__(self, bar: ProgressBar) -> None:
        self.bar = bar
        self.total = 0

    def __call__(self, iterable: Iterable[Any] | None = None, *, total: int | None = None, **_: Any) -> Any:
        if iterable is not None:
            return iterable
        self.total += total or 0
        return self

    def update(self, count: int = 1) -> None:
        self.bar.advance(count)
        self.bar.note(f"of {self.total} requests")

    def close(self) -> None:
        pass


@contextmanager
def _attribute(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an existing attribute inside the context."""
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside the context."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
