"""The processes of a run, started by torchrun, by SLURM or by this process. They end together.

The environment of each process has the variables that torchrun sets: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT. On one machine without a launcher, they do not depend on the environment.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from recondense import processes
from recondense.config.problems import Problem
from recondense.config.schema import TrainerConfig
from recondense.errors import UserError
from recondense.run import meeting
from recondense.run.environment import Started, started_together

POLL = 0.3  # seconds between checks of the other processes
GRACE = 5.0  # seconds during which a process may raise its own error after another one failed
FAILED = "failed"  # key in the store: "rank:exit code" of the first process that failed
NOTICED = "noticed"  # key in the store: number of other processes that have noticed the failure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """The number of processes of a run.

    Args:
        on_node: processes per machine.
        nodes: machines.
        started: this process among them, if a launcher started them all.
    """

    on_node: int
    nodes: int
    started: Started | None = None

    @property
    def world_size(self) -> int:
        return self.on_node * self.nodes


class Peer(SystemExit):
    """End of a process because another one failed, which has reported the reason."""


def plan_processes(settings: TrainerConfig, gpu: bool) -> Processes:
    """Return the number of processes that the settings request on this machine.

    Args:
        settings: settings of the trainer.
        gpu: whether each process uses its own GPU.

    Raises:
        UserError: a different number was started, or the first machine of several is unknown.
    """
    started, nodes = started_together(), settings.num_nodes
    if started is None:
        if nodes > 1:
            _machine(nodes)  # raises an error if the variables are missing
        on_node = (torch.cuda.device_count() if gpu else 1) if settings.devices == "auto" else int(settings.devices)
        return Processes(max(on_node, 1), nodes)
    size = started.world_size
    on_node = size // nodes if settings.devices == "auto" else int(settings.devices)
    if on_node * nodes != size:
        variables = "RANK, WORLD_SIZE and the like" if started.launcher == "torchrun" else "SLURM_STEP_NUM_TASKS"
        raise UserError(
            f"trainer.devices={settings.devices}, trainer.num_nodes={nodes}: {size} processes were "
            "started; use trainer.devices=auto (the default of trainer=ddp) and the correct trainer.num_nodes, or "
            f"start {on_node * nodes} processes. If none were, another program left {variables}: unset them."
        )
    return Processes(on_node, nodes, started)


def _machine(nodes: int) -> tuple[int, str, int]:
    """Return this machine's number and the address and port of the first one, for a run that no launcher started.

    Raises:
        UserError: a variable is missing, or is no such number.
    """
    node, address, port = (os.environ.get(name, "") for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"))
    if not (node and address and port):
        raise UserError(
            f"trainer.num_nodes={nodes}: the address of the first machine is unknown; use torchrun or "
            "srun on each machine, or set MASTER_ADDR, MASTER_PORT and NODE_RANK."
        )
    if not node.isdecimal() or int(node) >= nodes:
        raise UserError(f"NODE_RANK={node}: must be from 0 to {nodes - 1}, for trainer.num_nodes={nodes} machines.")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT={port}: must be the number of a port, from 1 to 65535.")
    return int(node), address, int(port)


@contextmanager
def start_processes(settings: TrainerConfig, gpu: bool, command: Sequence[str] | None = None) -> Iterator[None]:
    """Start the processes of a run, which all execute the code inside. If one fails, the others end too.

    A run with one process has no process group unless its engine needs one.

    Args:
        settings: settings of the trainer.
        gpu: whether each process uses its own GPU.
        command: command that starts a further process; None for the command that started this one.

    Raises:
        UserError: as for `plan_processes`.
        Peer: another process failed.
    """
    planned = plan_processes(settings, gpu)
    if planned.world_size == 1 and settings.strategy in ("auto", "ddp"):
        yield
        return
    before = dict(os.environ)
    children: list[subprocess.Popen[bytes]] = []
    try:
        os.environ.update(_environment(planned))
        if planned.started is None:
            children = _start(planned, command or [sys.executable, *sys.argv])
        with _group(settings, gpu, children):
            yield
        for child in children:
            child.wait(timeout=60)
    finally:
        for child in children:
            child.kill()
            child.wait()
        os.environ.clear()
        os.environ.update(before)


def _environment(planned: Processes) -> dict[str, str]:
    """Return the environment variables of this process; if it starts the others, those of the first process."""
    if started := planned.started:
        rank, local_rank, node = started.rank, started.local_rank, started.node_rank
        address, port, hosted = started.address, started.port, os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False")
    else:
        node, address, port = _machine(planned.nodes) if planned.nodes > 1 else (0, "127.0.0.1", meeting.free_port())
        rank, local_rank, hosted = node * planned.on_node, 0, "False"
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(planned.world_size),
        "LOCAL_WORLD_SIZE": str(planned.on_node),
        "NODE_RANK": str(node),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": hosted,
    }


def _start(planned: Processes, command: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """Start the other processes of this machine. They import from the folders of this one, its script's among them."""
    first = int(os.environ["RANK"])
    folders = os.pathsep.join(dict.fromkeys(map(os.path.abspath, sys.path)))
    environment = {**os.environ, "PYTHONPATH": folders, meeting.STARTER: str(os.getpid())}
    return [
        subprocess.Popen(list(command), env={**environment, "RANK": str(first + number), "LOCAL_RANK": str(number)})
        for number in range(1, planned.on_node)
    ]


@contextmanager
def _group(settings: TrainerConfig, gpu: bool, children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ and settings.num_threads is None:
        torch.set_num_threads(max(1, threads // here))
    if gpu:
        torch.cuda.set_device(local)
    timeout = timedelta(hours=settings.timeout_hours)  # the other processes wait while the first one evaluates
    with meeting.watched(children):
        store = meeting.meet(timeout)
        processes.join_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout, store)
    watch = _Watch.start(children)
    try:
        yield
        processes.barrier()
    except BaseException as error:
        if not watch.tell(_exit_code(error)):
            raise Peer(watch.code) from None
        raise
    finally:
        watch.stop()
        processes.leave_group()
        torch.set_num_threads(threads)


def _exit_code(error: BaseException) -> int:
    """Return the approximate exit code of a process that an error ends."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UserError | OSError) else 1


@dataclass
class _Watch:
    """A thread that ends this process after another one failed, because a collective would wait for that one for hours.

    Args:
        store: store shared by all processes, over a separate connection.
        children: processes that this one started.
        code: exit code of the first process that failed.
    """

    store: dist.Store
    children: Sequence[subprocess.Popen[bytes]]
    code: int = 1
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: Any = field(default_factory=threading.Lock)

    @classmethod
    def start(cls, children: Sequence[subprocess.Popen[bytes]]) -> _Watch:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=60)
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
        watch = cls(dist.PrefixStore(f"recondense/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), children)
        threading.Thread(target=watch._follow, daemon=True, name="recondense-peers").start()
        return watch

    def tell(self, code: int) -> bool:
        """Report a failure, so the others end with its exit code. Return whether this process failed first."""
        self._over.set()
        report = f"{processes.rank()}:{code}"
        try:
            with self._lock:
                first = self.store.compare_set(FAILED, "", report).decode()
                self.code = int(first.partition(":")[2])
                if first != report:
                    self.store.add(NOTICED, 1)
                elif processes.rank() == 0:  # the store ends with this process
                    self._wait_until(lambda: self.store.add(NOTICED, 0) >= dist.get_world_size() - 1)
        except RuntimeError:  # the first process has ended, and the store with it
            return False
        return first == report

    def stop(self) -> None:
        self._over.set()

    def _follow(self) -> None:
        while not self._over.wait(POLL):
            code = self._failed()
            if code is None:
                continue
            if not self._over.wait(GRACE):
                for child in self.children:
                    child.kill()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def _failed(self) -> int | None:
        """Return the exit code of another process that has failed; None if none has."""
        try:
            with self._lock:
                if not self._over.is_set() and self.store.check([FAILED]):
                    self.store.add(NOTICED, 1)
                    return int(self.store.get(FAILED).decode().partition(":")[2])
        except RuntimeError:
            return 1
        dead = [code for code in (child.poll() for child in self.children) if code]
        return dead[0] if dead and dead[0] > 0 else (1 if dead else None)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 2 * GRACE
        while not condition() and time.monotonic() < end:
            time.sleep(POLL)


def check_processes(settings: TrainerConfig, gpu: bool, batch_sizes: Mapping[str, int]) -> list[Problem]:
    """Return the problems of a run's processes.

    Args:
        settings: settings of the trainer.
        gpu: whether each process uses its own GPU.
        batch_sizes: windows per batch, by the name of the setting.
    """
    try:
        planned = plan_processes(settings, gpu)
    except UserError as error:
        return [Problem("", str(error))]
    size = planned.world_size
    unequal = f"each of {size} processes needs an equal part. Use a multiple of {size}, or another trainer.devices."
    problems = [Problem(name, unequal, batch) for name, batch in batch_sizes.items() if batch % size]
    if gpu and planned.started is None and planned.on_node > torch.cuda.device_count():
        text = f"this machine has {torch.cuda.device_count()} CUDA devices."
        problems.append(Problem("trainer.devices", text, settings.devices))
    return problems


def check_sweep() -> list[Problem]:
    """Return a problem if several processes were started for a sweep."""
    started = started_together()
    if started is None:
        return []
    text = (
        f"{started.world_size} processes were started for a sweep, but each run of a sweep starts its own processes. "
        "Start the sweep in one process: python train.py -m trainer=ddp trainer.devices=N."
    )
    return [Problem("-m", text)]
