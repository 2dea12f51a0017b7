"""Documents for held-out tasks, and the records that the tasks write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def texts(count: int = 8) -> list[str]:
    return [
        "".join(f"{'    ' * (line % 3)}value_{name} = compute(number, {line * 7919})\n\n" for line in range(30))
        for name in "abcdefgh"[:count]
    ]


def records(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
