"""Waiting for the other processes of a run: it is said for whom, and ends when it should."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest

from recondense.errors import UserError
from recondense.run import meeting

PROGRAM = """
import datetime
from recondense.run import meeting
from recondense.run.exit_codes import exit_codes
meeting.FIRST_NOTE = 0.2
with exit_codes():
    print("arrived", flush=True)
    meeting.meet(datetime.timedelta(hours=12))
    print("met", flush=True)
"""


@pytest.fixture(autouse=True)
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    values = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.free_port())}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(meeting, "FIRST_NOTE", 0.2)
    yield


def start(**variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_processes_meet_and_a_late_one_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), start(RANK="1") as other:
        store = meeting.meet(timedelta(seconds=60))
        assert other.communicate(timeout=60)[0].split() == ["arrived", "met"]
    assert store.add(meeting.JOINED, 0) == 2
    address = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    assert f"waiting for 1 of 2 processes at {address} since" in caplog.text and "unset RANK" in caplog.text
    assert len(caplog.records) <= 4, "each silence is longer than the last"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_wait_can_be_interrupted(number: signal.Signals, code: int, rank: str) -> None:
    with start(RANK=rank) as process:
        assert process.stdout is not None and process.stdout.readline() == "arrived\n"
        time.sleep(0.5)
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
    assert process.returncode == code
    missing = "waiting for 1 of 2 processes" if rank == "0" else "waiting for the first process"
    assert missing in err and "Traceback" not in err


def test_a_wait_that_lasts_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"waited \d s for 1 of 2 processes. Start all 2 processes"):
        meeting.meet(timedelta(seconds=0.3))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", str(meeting.free_port()))
    with pytest.raises(UserError, match=r"waited \d s for the first process \(Connection refused\)"):
        meeting.meet(timedelta(seconds=0.3))
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    with pytest.raises(UserError, match=r"no.such.host.invalid:\d+: waited \d+ s for the first process"):
        meeting.meet(timedelta(seconds=0.3))


def test_a_port_that_another_program_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "CONNECT", 1.0)
    with socket.create_server(("0.0.0.0", int(os.environ["MASTER_PORT"]))):
        with pytest.raises(UserError, match="the first process cannot listen there, because the port is taken"):
            meeting.meet(timedelta(seconds=5))
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(UserError, match="another program than the first process of this run listens there"):
            meeting.meet(timedelta(seconds=5))


def test_a_process_whose_starter_was_killed_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(meeting.STARTER, str(os.getpid()))  # which is not the parent
    with pytest.raises(UserError, match="the process that started this one has ended"):
        meeting.meet(timedelta(seconds=5))


def test_the_wait_does_not_stop_other_threads() -> None:
    ticks: list[float] = []
    over = threading.Event()

    def tick() -> None:
        while not over.wait(0.05):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    with pytest.raises(UserError):
        meeting.meet(timedelta(seconds=0.5))
    over.set()
    thread.join()
    assert len(ticks) > 3
