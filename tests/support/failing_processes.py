"""Two processes, of which one fails while the other waits for it. A script: failing_processes.py WAY."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time

from recondense import processes
from recondense.config.schema import TrainerConfig
from recondense.errors import ConfigError
from recondense.run import launching
from recondense.run.exit_codes import exit_codes
from support.engine_runs import environment, on_processes


def run(rank: int, port: int) -> None:
    os.environ.update(environment(rank, port))
    faulthandler.dump_traceback_later(60, exit=True)
    way = sys.argv[1]
    with exit_codes(), launching.start_processes(TrainerConfig(strategy="ddp", devices="auto"), gpu=False):
        processes.barrier()
        if way == "both" or rank == {"first": 0, "other": 1, "killed": 1}[way]:
            if way == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ConfigError(["the disk is full"])
        if way == "killed":
            processes.barrier()
        time.sleep(30)  # the failure of the other ends this one


if __name__ == "__main__":
    sys.exit(on_processes(run))
