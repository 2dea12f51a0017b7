"""Output that cannot be written is dropped, or goes where it can be read."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from recondense.run.lost_output import survive_lost_output

PROGRAM = """
import sys
from recondense.run.lost_output import survive_lost_output
with survive_lost_output():
    print("a log line", file=sys.stderr)
    for number in range(3):
        print(f"report {number} \\u00d7", "x" * 20_000)
"""
FULL = "/dev/full"  # a device whose disk is always full


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_pipe_ends_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, name, closed)
        with survive_lost_output():
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
        with survive_lost_output():
            print("two")
        print("three", flush=True)
        stream.close()
        assert read.read().split() == ["one", "two", "three"]


def test_streams_that_are_no_files_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a notebook."""
    cell = io.StringIO()
    monkeypatch.setattr(sys, "stdout", cell)
    with survive_lost_output():
        assert sys.stdout is cell


def test_a_pipe_that_does_not_block_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    child = subprocess.Popen([sys.executable, "-c", "import sys; print(len(sys.stdin.read()))"], stdin=reader,
                             stdout=subprocess.PIPE)  # fmt: skip
    os.close(reader)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with survive_lost_output():
            print("x" * 500_000)
    assert child.communicate()[0].split() == [b"500001"]


@pytest.mark.skipif(not os.path.exists(FULL), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("streams", "reported", "logged"),
    [
        (">&-", "stderr", True), ("2>&-", "stdout", False), (">&- 2>&-", None, False), ("<&- >&-", "stderr", True),
        (f"> {FULL}", "stderr", True), (f"2> {FULL}", "stdout", False), (f"> {FULL} 2> {FULL}", None, False),
        (f"> {FULL} 2>&-", None, False), ("> /dev/null", None, True),
    ],
)  # fmt: skip
def test_the_report_is_printed_where_it_can_be(streams: str, reported: str | None, logged: bool) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {streams}', sys.executable, PROGRAM],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("a log line" in done.stderr) == logged
    for name in ("stdout", "stderr"):
        assert getattr(done, name).count("report") == 3 * (name == reported)
    if reported is not None:
        assert "report 2 ? x" in getattr(done, reported), "what an encoding lacks is replaced"
