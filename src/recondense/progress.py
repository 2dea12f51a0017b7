"""Progress of long stages: one bar a stage on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")

log = logging.getLogger("recondense.progress")

_setting: bool | None = None  # None = bars when stderr is a terminal
_shared: Progress | None = None  # the display that is live now; nested stages add a row to it


def configure(enabled: bool | None) -> None:
    """Turn bars on (still only on a terminal), off, or back to automatic."""
    global _setting
    _setting = enabled


def bars_enabled() -> bool:
    """Whether a stage that starts now shows a bar: a terminal, not turned off, and the first of several processes."""
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) or 0)
    return _setting is not False and rank == 0 and sys.stderr.isatty()


class Stage:
    """One stage that is running. `advance` moves it on, `note` shows a few words beside it."""

    def __init__(self, description: str, total: float | None, display: Progress | None) -> None:
        self.description = description
        self.total = total
        self.completed: float = 0
        self._display = display
        self._task: TaskID | None = None
        if display is not None:
            self._task = display.add_task(description, total=total, note="")

    @property
    def shown(self) -> bool:
        """Whether there is a bar. Without one, a caller may write lines of its own to the log."""
        return self._display is not None

    def advance(self, amount: float = 1) -> None:
        """Count `amount` more units as done."""
        self.update(self.completed + amount)

    def update(self, completed: float) -> None:
        """Set how many units are done."""
        self.completed = completed
        if self._display is not None and self._task is not None:
            self._display.update(self._task, completed=completed)

    def note(self, text: str) -> None:
        """Replace the words after the bar, for example the loss."""
        if self._display is not None and self._task is not None:
            self._display.update(self._task, note=text)

    def _close(self, *, remove: bool) -> None:
        if self._display is None or self._task is None:
            return
        if remove:
            self._display.remove_task(self._task)
        else:
            self._display.stop_task(self._task)


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Stage]:
    """Show that a stage runs, and how far it is.

    On a terminal this is a bar on stderr, below the bar of the stage that contains it. Elsewhere two lines are logged,
    at the start and at the end with the time it took.

    Args:
        description: what is being done, a few words.
        total: how many units there are; None when that is not known.
    """
    global _shared
    started = time.perf_counter()
    if not bars_enabled():
        log.info("%s: started%s", description, "" if total is None else f" ({total:g})")
        yield Stage(description, total, None)
        log.info("%s: done in %.1f s", description, time.perf_counter() - started)
        return
    if _shared is not None:
        stage = Stage(description, total, _shared)
        try:
            yield stage
        finally:
            stage._close(remove=True)  # a stage within another leaves no row behind: there may be hundreds
        return
    with _display() as _shared:
        stage = Stage(description, total, _shared)
        try:
            yield stage
        finally:
            stage._close(remove=False)
            _shared = None


def track(iterable: Iterable[Item], description: str, total: float | None = None) -> Iterator[Item]:
    """Go through `iterable` and show the progress of doing so; `total` is its length unless given."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with progress(description, total) as stage:
        for item in iterable:
            yield item
            stage.advance()


def _display() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        refresh_per_second=4,
    )
