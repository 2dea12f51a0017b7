"""Progress: bars on a terminal, lines elsewhere, and nested bars."""

import io
import logging
import sys

import pytest

from recondense import progress as module
from recondense.progress import allow_bars, bars_enabled, progress, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """To be called in the test itself: pytest replaces sys.stderr after the fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return stream


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_two_lines_without_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert list(track(range(3), "search")) == [0, 1, 2]
    first, last = messages(caplog)
    assert first == "search: started (3)" and last.startswith("search: done in")


def test_work_that_fails_is_not_done(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError), progress("search"):
        raise RuntimeError
    assert messages(caplog) == ["search: started"]


def test_bars_on_a_terminal_also_nested(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    screen = terminal(monkeypatch)
    with caplog.at_level(logging.INFO), progress("outer stage", 2) as outer:
        assert outer.shown
        for _ in range(2):
            for _ in track([1, 2], "inner stage"):
                assert module._screen.live is not None
                module._screen.live.refresh()
            outer.advance()
        outer.note("loss 4.5")
        assert [task.description for task in module._screen.live.tasks] == ["outer stage"]  # type: ignore[union-attr]
    assert module._screen.live is None
    shown = screen.getvalue()
    assert all(text in shown for text in ("outer stage", "inner stage", "2/2", "loss 4.5"))
    assert messages(caplog) == []


def test_the_display_ends_with_its_bars_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch)
    with pytest.raises(RuntimeError), progress("outer"), progress("inner"):
        raise RuntimeError
    assert module._screen.live is None
    iterator = track([1, 2, 3], "left early")
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert module._screen.live is None


def test_bars_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch)
    assert bars_enabled()
    allow_bars(False)
    try:
        assert not bars_enabled()
    finally:
        allow_bars(None)
    monkeypatch.setenv("RANK", "1")
    assert not bars_enabled()
