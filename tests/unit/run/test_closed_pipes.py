"""Output into a pipe whose reader is gone is dropped."""

from __future__ import annotations

import os
import sys

import pytest
from rich.console import Console

from recondense.run.closed_pipes import survive_closed_pipes


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_pipe_ends_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, name, closed)
        with survive_closed_pipes():
            stream = getattr(sys, name)
            for _ in range(3):
                print("x" * 100_000, file=stream, flush=True)
            Console(file=stream).print("a table")
            assert stream is not closed and stream.encoding == closed.encoding and not stream.isatty()
        assert getattr(sys, name) is closed


def test_what_is_written_before_inside_and_after_is_read_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader) as read, os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        print("one")
        with survive_closed_pipes():
            print("two")
        print("three", flush=True)
        stream.close()
        assert read.read().split() == ["one", "two", "three"]


def test_other_streams_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # of a program without a terminal
    before = sys.stdout
    with survive_closed_pipes():
        assert sys.stdout is before and sys.stderr is None
