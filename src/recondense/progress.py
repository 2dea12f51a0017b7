"""Progress of long work: a bar on a terminal, elsewhere a line in the log at the start and one at the end."""

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
    """Where bars are shown. A process has one, because a terminal takes one live display at a time."""

    def __init__(self) -> None:
        self.allowed = True  # False shows no bars
        self.live: Progress | None = None  # the display that is shown now; a bar within another adds a row to it


_screen = _Screen()


def allow_bars(enabled: bool | None) -> None:
    """Turn the bars of this process off with False, and on again with True or None (still only on a terminal)."""
    _screen.allowed = enabled is not False


def bars_enabled() -> bool:
    """Whether a bar that starts now is shown: on a terminal, not turned off, and by the first of several processes."""
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) or 0)
    return _screen.allowed and rank == 0 and sys.stderr.isatty()


class ProgressBar:
    """One progress bar. `advance` moves it on, `note` shows a few words beside it.

    Args:
        description: what is being done.
        total: number of units; None if it is not known.
        display: where the bar is shown; None shows none.
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
        """Whether the bar is shown. If not, a caller may log lines in its place."""
        return self._display is not None

    def advance(self, amount: float = 1) -> None:
        """Count `amount` more units as done."""
        self.update(self.completed + amount)

    def update(self, completed: float) -> None:
        """Set the number of units that are done."""
        self.completed = completed
        if self._display is not None and self._task is not None:
            self._display.update(self._task, completed=completed)

    def note(self, text: str) -> None:
        """Replace the words after the bar, for example the loss."""
        if self._display is not None and self._task is not None:
            self._display.update(self._task, note=text)

    def close(self, *, remove: bool) -> None:
        """Stop the bar; `remove` takes its row away."""
        if self._display is None or self._task is None:
            return
        if remove:
            self._display.remove_task(self._task)
        else:
            self._display.stop_task(self._task)


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[ProgressBar]:
    """Show what is being done inside, and how far it is.

    On a terminal this is a bar on stderr, below the bar that contains it. Elsewhere two lines are logged: at the start,
    and at the end with the seconds it took.

    Args:
        description: what is being done, a few words.
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
            bar.close(remove=not outermost)  # a bar within another leaves no row behind: there may be hundreds


@contextmanager
def _shown() -> Iterator[tuple[Progress, bool]]:
    """The live display, and whether it starts here."""
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
    """Go through `iterable` behind a progress bar; `total` is its length unless given."""
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
