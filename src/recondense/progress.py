"""Show the progress of long work: a bar on a terminal, elsewhere a log line at the start and one at the end."""

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


class _Screen:
    """The display of this process. There is one, because a terminal shows one live display at a time."""

    def __init__(self) -> None:
        self.allowed = True  # False shows no bars
        self.live: Progress | None = None  # the current display; a nested bar adds a row to it


_screen = _Screen()


def allow_bars(enabled: bool | None) -> None:
    """Turn the bars of this process off (False) or on (True or None); they are only ever shown on a terminal."""
    _screen.allowed = enabled is not False


def bars_enabled() -> bool:
    """Return whether a new bar is shown: on a terminal, if not turned off, and only on the first process."""
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) or 0)
    return _screen.allowed and rank == 0 and sys.stderr.isatty()


class ProgressBar:
    """One progress bar. `advance` moves it, `note` shows a few words after it.

    Args:
        description: what is being done.
        total: number of units; None if it is not known.
        display: the display that shows the bar; None shows no bar.
    """

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
        """Whether the bar is shown. If not, a caller may log lines instead."""
        return self._display is not None

    def advance(self, amount: float = 1) -> None:
        """Add `amount` to the number of completed units."""
        self.update(self.completed + amount)

    def update(self, completed: float) -> None:
        """Set the number of completed units."""
        self.completed = completed
        if self._display is not None and self._task is not None:
            self._display.update(self._task, completed=completed)

    def note(self, text: str) -> None:
        """Set the text after the bar, for example the loss."""
        if self._display is not None and self._task is not None:
            self._display.update(self._task, note=text)

    def close(self, *, remove: bool) -> None:
        """Stop the bar; `remove` also removes its row."""
        if self._display is None or self._task is None:
            return
        if remove:
            self._display.remove_task(self._task)
        else:
            self._display.stop_task(self._task)


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[ProgressBar]:
    """Show the progress of the work inside the context.

    On a terminal this is a bar on stderr, below any bar that encloses it. Elsewhere two lines are logged: one at the
    start, and one at the end with the seconds taken.

    Args:
        description: what is being done, in a few words.
        total: number of units; None if it is not known.

    Yields:
        the bar.
    """
    started = time.perf_counter()
    if not bars_enabled():
        log.info("%s: started%s", description, "" if total is None else f" ({total:g})")
        yield ProgressBar(description, total, None)
        log.info("%s: done in %.1f s", description, time.perf_counter() - started)
        return
    with _shown() as (display, outermost):
        bar = ProgressBar(description, total, display)
        try:
            yield bar
        finally:
            bar.close(remove=not outermost)  # a nested bar leaves no row behind: there may be hundreds


@contextmanager
def _shown() -> Iterator[tuple[Progress, bool]]:
    """Yield the live display, and whether this call started it."""
    if _screen.live is not None:
        yield _screen.live, False
        return
    with _display() as display:
        _screen.live = display
        try:
            yield display, True
        finally:
            _screen.live = None


def track(iterable: Iterable[Item], description: str, total: float | None = None) -> Iterator[Item]:
    """Iterate over `iterable` with a progress bar; `total` defaults to its length."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with progress(description, total) as bar:
        for item in iterable:
            yield item
            bar.advance()


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
