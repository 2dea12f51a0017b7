"""lm-eval's tasks on the live model: quietly, without a look-up that nobody needs, and leaving the model as it was."""

from __future__ import annotations

import copy
import difflib
import functools
import logging
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense.errors import UserError
from recondense.evaluation.heldout_tasks import HELDOUT_TASKS
from recondense.models.hooks import evaluating
from recondense.offline import reachable_or_offline
from recondense.progress import Stage, progress

IncludePath = str | Path | Sequence[str | Path] | None
FILE_FORMATS = ("json", "csv", "text", "parquet", "arrow", "xml")  # what `datasets` reads from files
BOOTSTRAP_ITERATIONS = 1000  # for the metrics whose standard error has no closed form


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = 0,
    batch_size: int = 8,
    include_path: IncludePath = None,
    description: str = "lm-eval",
) -> dict[str, dict[str, float]]:
    """Run lm-eval tasks on the live model, which stays as it is: weights, mode, tokenizer and random states.

    Args:
        tasks: names of tasks, groups or tags, lm-eval's or those in `include_path`.
        limit: examples of each task; a number below 1 is a fraction.
        num_fewshot: examples in the prompt; tasks that fix them at 0 keep 0; None leaves every task its own number.
        include_path: folders with further task files.
        description: shown as progress.

    Returns:
        for each task (a tag: each of its tasks; a group: its mean) the metrics and standard errors that are numbers.

    Raises:
        UserError: an unknown task, with the nearest names.
        UserError: a task's data is not cached and the hub cannot be reached.
    """
    problems = check_tasks(tasks, include_path)
    if problems:
        raise UserError("\n".join(problems))
    manager = _manager(tasks, include_path)
    with ExitStack() as stack:
        stack.enter_context(_own_random_states())
        stack.enter_context(reachable_or_offline(offline=True if _on_disk(manager, tasks) else None))
        stack.enter_context(_quiet(description))
        stack.enter_context(evaluating(model))
        from lm_eval.evaluator import evaluate

        loaded = _load(manager, tasks)
        for task in loaded["tasks"].values():
            _set_fewshot(task, num_fewshot)
        results = evaluate(
            lm=_live_model(model, tokenizer, batch_size),
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            log_samples=False,
        )
    assert results is not None, "lm-eval has results on the first process alone"
    found = {**results["results"], **results.get("groups", {})}
    return {name: _numbers(found[name]) for name in _reported(manager, tasks) if name in found}


def check_tasks(tasks: Sequence[str] | None, include_path: IncludePath = None) -> list[str]:
    """Problems of task names, as sentences; reading lm-eval's list takes seconds, tasks of one's own do not need it.

    Args:
        tasks: None: all that `include_path` defines.
    """
    problems = _check_folders(include_path)
    if tasks is None:
        if not problems and not folder_tasks(include_path):
            problems.append(
                f"evaluation.include_path={include_path}: none of its YAML files defines a task; one that does has a "
                "line `task: <name>`."
            )
        return problems
    local = _local_tasks(include_path).all_tasks if include_path is not None else ()
    unknown = [task for task in tasks if task not in (*HELDOUT_TASKS, *local)]
    if not unknown:
        return problems
    known = [*_all_tasks(_folders(include_path)).all_tasks, *HELDOUT_TASKS]
    for task in dict.fromkeys(unknown):
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them."
            problems.append(f"evaluation.tasks: lm-eval has no task {task!r}; {hint}")
    return problems


def folder_tasks(include_path: IncludePath) -> list[str]:
    """The tasks that the YAML files of folders define, by name; groups and tags, which are made of tasks, are not."""
    return list(_local_tasks(include_path).all_subtasks)


def _check_folders(include_path: IncludePath) -> list[str]:
    """Files that are no YAML: lm-eval's index leaves them out without a word."""
    if not _folders(include_path):
        return []  # before an import that takes seconds
    from lm_eval.tasks._yaml_loader import load_yaml

    problems = []
    for path in (path for folder in _folders(include_path) for path in sorted(Path(folder).rglob("*.yaml"))):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # whatever a parser, or a file that it includes, raises
            problems.append(f"evaluation.include_path: {path} cannot be read: {' '.join(str(error).split())}")
    return problems


def _folders(include_path: IncludePath) -> tuple[str, ...]:
    if include_path is None:
        return ()
    return tuple(map(str, [include_path] if isinstance(include_path, str | Path) else include_path))


def _manager(tasks: Sequence[str], include_path: IncludePath) -> Any:
    """An index that has the tasks: of their folders alone, where all are defined there."""
    local = _local_tasks(include_path)
    # A group of somebody's may be made of lm-eval's tasks.
    return local if set(tasks) <= set(local.all_subtasks) else _all_tasks(_folders(include_path))


def _on_disk(manager: Any, tasks: Sequence[str]) -> bool:
    """Whether tasks read files of this machine: then nothing is looked up, which would wait for its time-out."""
    for task in tasks:
        settings = manager.task_index[task].cfg or {}
        if settings.get("dataset_path") not in FILE_FORMATS or "://" in str(settings.get("dataset_kwargs")):
            return False
    return True


def _local_tasks(include_path: IncludePath) -> Any:
    """An index of the tasks in some folders alone."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(_folders(include_path)), include_defaults=False)


@functools.lru_cache(maxsize=4)
def _all_tasks(folders: tuple[str, ...]) -> Any:
    """An index that has lm-eval's own 14,000 tasks too: ten seconds to read, so only when needed, and once."""
    from lm_eval.tasks import TaskManager

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a task of one's own may have the name of one of lm-eval's: that is what it is for
    try:
        return TaskManager(include_path=list(folders))
    finally:
        logger.setLevel(level)


def _load(manager: Any, tasks: Sequence[str]) -> Any:
    """Tasks with their data."""
    try:
        return manager.load(list(dict.fromkeys(tasks)))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        if isinstance(error, ConnectionError) or "OfflineMode" in reason or "offline" in reason:
            raise UserError(
                f"evaluation.tasks={','.join(tasks)}: {reason}; the hub cannot be reached and the cache does not hold "
                "their data: check the network, or use evaluation=heldout or evaluation=none."
            ) from error
        raise


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)  # lm-eval's own default, so that its published numbers can be compared


def _live_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    device: str = model.get_input_embeddings().weight.device.type  # type: ignore[union-attr,assignment]
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives it a padding token
        batch_size=batch_size,
        softmax_dtype="float32",
        mixed_precision_dtype=autocast,
    )


def _reported(manager: Any, tasks: Sequence[str]) -> list[str]:
    """The names to report: a tag stands for its tasks."""
    index = manager.task_index
    names: list[str] = []
    for task in tasks:
        tagged = index[task].kind.name == "TAG"
        names += sorted(index[task].tags) if tagged else [task]
    return list(dict.fromkeys(names))


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """lm-eval's metrics under short names: "acc,none" is acc, and another filter's is acc_<filter>."""
    found = {}
    for key, value in metrics.items():
        name, _, filter_name = key.partition(",")
        if filter_name and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[name if filter_name == "none" else f"{name}_{filter_name}"] = float(value)
    return found


# --------------------------------------------------------------------------------------------------------- silence


@contextmanager
def _own_random_states() -> Iterator[None]:
    """Seeds of lm-eval's choice inside; the generators are restored, so that evaluating does not change a training."""
    from lightning.pytorch.utilities.seed import isolate_rng  # late: seconds, which refusing a command should not take

    with isolate_rng(include_cuda=torch.cuda.is_available()):
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        yield


@contextmanager
def _quiet(description: str) -> Iterator[None]:
    """Neither bars nor logs of the libraries below an error; requests to the model show as progress of ours."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    with ExitStack() as stack:
        for name in ("lm_eval", "datasets", "transformers"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if not datasets.are_progress_bars_disabled():
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        requests = _Requests(stack.enter_context(progress(description)))
        for module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
            stack.enter_context(patch.object(module, "tqdm", requests))
        # Standard errors by bootstrap would otherwise fork a process per core, beside torch's threads.
        stack.enter_context(patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}))
        yield


class _Requests:
    """Stands where lm-eval expects tqdm: counts requests to the model; loops over other things show nothing."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.total = 0

    def __call__(self, iterable: Iterable[Any] | None = None, *, total: int | None = None, **_: Any) -> Any:
        if iterable is not None:
            return iterable
        self.total += total or 0
        return self

    def update(self, count: int = 1) -> None:
        self.stage.advance(count)
        self.stage.note(f"of {self.total} requests")

    def close(self) -> None:
        pass
