"""Reads the file of an offline run of W&B, record by record, without any of W&B's own readers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32768  # the file is a LevelDB log: blocks of this size, with records that may span several of them
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What an offline run of W&B holds.

    Args:
        run: the record of the run: project, group, name, tags and so on.
        config: its config.
        history: the metrics of each step, in the order in which they were logged.
        summary: the last value of each summary metric.
        exited: whether the run was finished.
        folder: the folder of the run, with its pictures and tables.
    """

    run: Any
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exited: bool = False
    folder: Path = Path()

    def logged(self, name: str) -> dict[int, Any]:
        """Return the values of a metric by optimizer step."""
        return {row["trainer/global_step"]: row[name] for row in self.history if name in row}

    def table(self, name: str) -> dict[str, Any]:
        """Return the columns and cells of a logged table."""
        path = next(row[f"{name}/path"] for row in self.history if f"{name}/path" in row)
        return json.loads((self.folder / "files" / path).read_text())


def offline_runs(logs: Path, count: int = 1) -> list[OfflineRun]:
    """Read the offline runs in a `logs` folder, in order, once W&B's process has written their ends.

    Args:
        logs: the folder that holds `wandb`.
        count: how many runs there are.
    """
    until = time.monotonic() + 20
    while True:
        files = sorted((logs / "wandb").glob("offline-run-*/*.wandb"))
        runs = [read_run(path) for path in files]
        if len(runs) == count and all(run.exited for run in runs):
            return runs
        assert time.monotonic() < until, f"{files}: {[run.exited for run in runs]}"
        time.sleep(0.1)


def read_run(path: Path) -> OfflineRun:
    """Read the file of one run."""
    from wandb.proto.wandb_internal_pb2 import Record

    read = OfflineRun(None, folder=path.parent)
    for content in _contents(path.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            read.run = record.run
            read.config |= _items(record.run.config.update)
        elif kind == "config":
            read.config |= _items(record.config.update)
        elif kind == "history":
            read.history.append(_items(record.history.item))
        elif kind == "summary":
            read.summary |= _items(record.summary.update)
        read.exited |= kind == "exit"
    return read


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _contents(data: bytes) -> Iterator[bytes]:
    """Yield the contents of the records of a log that may still be written."""
    assert data[:4] == b":W&B", "no file of W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        rest = BLOCK - position % BLOCK
        if rest < 7:
            position += rest
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        content = data[position + 7 : position + 7 + size]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(content) < size:
            return
        position += 7 + size
        parts = content if kind in (FULL, FIRST) else parts + content
        if kind in (FULL, LAST):
            yield parts
