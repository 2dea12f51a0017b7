"""How many examples of each lm-eval task are evaluated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from recondense.evaluation.lm_eval_internals import tasks_of_tag
from recondense.evaluation.task_errors import naming


def limits(manager: Any, loaded: Any, names: Sequence[str], limit: float | None, total: int | None) -> dict[str, Any]:
    """Return lm-eval's arguments for the limits of `run_tasks`: one limit for all tasks, or the examples of each.

    Args:
        manager: lm-eval's manager of tasks.
        loaded: what it loaded.
        names: the names of tasks, groups and tags that were loaded.
        limit: maximum number of examples per task; below 1, a fraction. None for all.
        total: maximum number of examples per name, shared by its tasks, which have at least one. None for all.
    """
    if total is None:
        return {"limit": limit}
    shares, samples = dict[str, int](), dict[str, list[int]]()
    for name in names:
        group = loaded["groups"].get(name)
        tasks = [task.task_name for task in group.get_all_tasks()] if group else tasks_of_tag(manager, name) or [name]
        for task in tasks:
            shares[task] = max(1, total // len(tasks), shares.get(task, 0))  # of two names, the larger share
    if set(shares.values()) == {total} and (limit is None or limit >= 1):  # lm-eval then reads no further documents
        return {"limit": total if limit is None else min(int(limit), total)}
    for name, task in loaded["tasks"].items():
        with naming(name):
            size = len(task.eval_docs)
        most = size if limit is None else math.ceil(size * limit) if limit < 1 else int(limit)
        samples[name] = list(range(min(size, most, shares[name])))
    return {"samples": samples}
