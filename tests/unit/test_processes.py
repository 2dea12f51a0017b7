"""What the first process does while the others wait must not need them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forks import Forks

from recondense import processes

SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.mark.parametrize(
    "call",
    [
        processes.world_size,
        processes.has_group,
        processes.local_world_size,
        processes.barrier,
        lambda: processes.take_share([1, 2]),
        lambda: processes.broadcast(1),
        lambda: processes.gather(1),
        lambda: processes.mean({"loss": torch.ones(())}),
        lambda: processes.run_on_first(lambda: 1),
        lambda: processes.SharedMapping({})["key"],
    ],
)
def test_what_needs_the_others_is_refused_while_they_wait(call: Callable[[], Any]) -> None:
    """Also in a run of one process, so that every run shows the mistake."""
    with pytest.raises(AssertionError, match="are waiting for this one"):
        processes.run_on_first(call)
    assert processes.world_size() == 1  # afterwards it works again


def test_the_first_process_knows_its_rank_and_may_work_alone() -> None:
    assert processes.run_on_first(lambda: (processes.rank(), processes.is_first())) == (0, True)

    def train() -> list[int]:
        with processes.work_alone():
            return processes.gather(processes.world_size())

    assert processes.run_on_first(train) == [1]


def test_two_processes(forks: Forks, tmp_path: Path) -> None:
    ended = forks.run(SUPPORT / "first_works.py", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_working_alone_is_refused_where_others_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    with pytest.raises(AssertionError, match="are not waiting"), processes.work_alone():
        pass
