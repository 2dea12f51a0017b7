"""The processes of a run wait for each other, in steps that Ctrl-C and SIGTERM interrupt, and say for whom."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from recondense.errors import UserError

POLL = 0.2  # seconds between two looks
FIRST_NOTE, LONGEST_SILENCE = 5.0, 1800.0  # seconds until the wait is logged; each silence is four times the last
CONNECT = 30.0  # seconds for a connection with a first process that listens
STARTER = "RECONDENSE_STARTER"  # variable of a process that another one of the run started: the id of that one
JOINED = "joined"  # key in the store: number of processes that have arrived

log = logging.getLogger(__name__)


def free_port() -> int:
    """Return a port of this machine that no program uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def meet(timeout: timedelta) -> dist.Store:
    """Wait until all processes of the run have arrived, and return a store that they share.

    The environment has torchrun's variables.

    Args:
        timeout: how long to wait.

    Raises:
        UserError: the others did not arrive in time, the first process left, or its port is taken or not a run's.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    wait = _Wait(timeout, size)
    hosted = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun hosts the store
    store = _host(wait) if hosted else _connect(wait)
    shared = dist.PrefixStore(f"recondense/meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    shared.set_timeout(timeout)
    try:
        shared.add(JOINED, 1)
        while (missing := size - shared.add(JOINED, 0)) > 0:
            wait.step(f"{missing} of {size} processes")
    except RuntimeError as error:
        raise UserError(f"{wait.address}: the first process of this run has ended, before all had started.") from error
    return shared


class _Wait:
    """A wait for other processes.

    Args:
        timeout: how long it may last.
        size: number of processes.
    """

    def __init__(self, timeout: timedelta, size: int) -> None:
        self.host, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.address = f"{self.host}:{self.port}"
        self._size = size
        self._start = time.monotonic()
        self._note = FIRST_NOTE
        self._timeout = timeout.total_seconds()

    def step(self, missing: str) -> None:
        """Wait a moment, and now and then log for what.

        Args:
            missing: what is waited for.

        Raises:
            UserError: the wait has lasted too long.
        """
        waited, starter = time.monotonic() - self._start, os.environ.get(STARTER)
        if starter is not None and os.getppid() != int(starter):
            raise UserError("the process that started this one has ended")
        hint = (
            f"Start all {self._size} processes of the run; if there should be only one, unset RANK, WORLD_SIZE, "
            "MASTER_ADDR and SLURM's variables, which another program left"
        )
        if waited > self._timeout:
            raise UserError(f"{self.address}: waited {waited:.0f} s for {missing}. {hint}.")
        if waited > self._note:
            log.warning("waiting for %s at %s since %.0f s. %s.", missing, self.address, waited, hint)
            self._note += min(4 * self._note, LONGEST_SILENCE)
        time.sleep(POLL)


def _host(wait: _Wait) -> dist.Store:
    """Return the store of this process, which is the first."""
    try:
        return _open_store(wait, hosts=True)
    except RuntimeError as error:
        raise UserError(
            f"MASTER_ADDR={wait.host}, MASTER_PORT={wait.port}: the first process cannot listen there, because the "
            "port is taken, or the address is not this machine's. Choose another MASTER_PORT, or unset both."
        ) from error


def _connect(wait: _Wait) -> dist.Store:
    """Return the store of the first process, once it listens."""
    while True:
        try:
            # Python's socket is quiet, and its errors can be caught one by one; torch's retries for the whole timeout.
            socket.create_connection((wait.host, wait.port), timeout=1).close()
            break
        except OSError as error:
            wait.step(f"the first process ({error.strerror or error})")
    try:
        return _open_store(wait, hosts=False)
    except RuntimeError as error:
        raise UserError(
            f"MASTER_ADDR={wait.host}, MASTER_PORT={wait.port}: another program than the first process of this run "
            "listens there. Choose another MASTER_PORT, or unset both."
        ) from error


def _open_store(wait: _Wait, *, hosts: bool) -> dist.Store:
    """Return a store, made in a thread: torch waits forever for an answer of a program that gives none.

    Raises:
        RuntimeError: there is none after `CONNECT` seconds, or torch cannot make one.
    """
    made: list[dist.Store | RuntimeError] = []

    def make() -> None:
        timeout = timedelta(seconds=CONNECT)
        try:
            made.append(dist.TCPStore(wait.host, wait.port, None, hosts, timeout, wait_for_workers=False))
        except RuntimeError as error:
            made.append(error)

    threading.Thread(target=make, daemon=True, name="recondense-store").start()
    end = time.monotonic() + CONNECT
    while not made and time.monotonic() < end:
        time.sleep(POLL / 10)
    outcome = made[0] if made else RuntimeError("no answer")
    if isinstance(outcome, RuntimeError):
        raise outcome
    return outcome


@contextmanager
def watched(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """End this process if one that it started ends before all have joined the group; it would wait for hours."""
    met = threading.Event()

    def follow() -> None:
        while not met.wait(POLL):
            code = next((child.returncode for child in children if child.poll() is not None), None)
            if code is not None and not met.is_set():
                log.error("a process of this run ended with exit code %d before it joined the others", code)
                for child in children:
                    child.kill()
                logging.shutdown()
                os._exit(code if code > 0 else 1)

    threading.Thread(target=follow, daemon=True, name="recondense-meeting").start()
    try:
        yield
    finally:
        met.set()
