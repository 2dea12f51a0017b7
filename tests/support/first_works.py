"""Two processes, of which the first works while the other waits. A script: first_works.py."""

from __future__ import annotations

import faulthandler
import os
import sys
from datetime import timedelta

from recondense import processes
from support.engine_runs import environment, on_processes


def run(rank: int, port: int) -> None:
    os.environ.update(environment(rank, port))
    faulthandler.dump_traceback_later(60, exit=True)
    processes.join_group("gloo", timedelta(minutes=1))

    def work() -> dict[str, object]:
        assert (processes.rank(), processes.is_first()) == (0, True) == (rank, not rank)
        with processes.work_alone():
            alone = processes.world_size(), processes.gather("value"), processes.run_on_first(processes.is_first)
        try:
            processes.barrier()
        except AssertionError as error:
            return {"alone": alone, "refused": "are waiting for this one" in str(error)}
        raise RuntimeError("the first process would wait for ever")

    result = processes.run_on_first(work)
    assert result == {"alone": (1, ["value"], True), "refused": True}, result
    assert processes.gather(rank) == [0, 1]
    processes.leave_group()


if __name__ == "__main__":
    sys.exit(on_processes(run))
