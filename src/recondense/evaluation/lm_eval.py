"""Run lm-eval tasks on a model in memory, without lm-eval's output, needless requests, or changes to the model."""

from __future__ import annotations

import copy
import difflib
import functools
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense.config.problems import Problem, render
from recondense.data.vocabulary import filler, require_rows
from recondense.errors import UserError
from recondense.evaluation.heldout_tasks import HELDOUT_TASKS
from recondense.evaluation.lm_eval_internals import (
    check_encoded,
    check_yaml,
    requests_shown,
    task_settings,
    tasks_of_tag,
)
from recondense.evaluation.task_errors import check_documents, name_errors, naming
from recondense.evaluation.task_limits import limits
from recondense.models import decoder
from recondense.models.hooks import eval_mode
from recondense.models.tokenizers import embedding_rows
from recondense.offline import hub_access
from recondense.progress import progress

IncludePath = str | Path | Sequence[str | Path] | None
FILE_FORMATS = ("json", "csv", "text", "parquet", "arrow", "xml")  # what `datasets` reads from files
CHECKED = 256  # documents of a local task that are built before a model is loaded
BOOTSTRAP_ITERATIONS = 1000  # for the metrics whose standard error has no closed form


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | float | None = None,
    total_limit: int | None = None,
    num_fewshot: int | None = 0,
    batch_size: int = 8,
    include_path: IncludePath = None,
    description: str = "lm-eval",
) -> dict[str, dict[str, float]]:
    """Run lm-eval tasks on a model in memory. Its weights and mode, the tokenizer and random states do not change.

    Args:
        model, tokenizer: a causal LM and its tokenizer.
        tasks: names of tasks, groups or tags of lm-eval or of `include_path`.
        limit: maximum number of examples per task, as in lm-eval: of each task in a group. Below 1: a fraction.
        total_limit: maximum number of examples per name in `tasks`, shared by a group's tasks, which have at least one.
        num_fewshot: examples in the prompt, except for tasks that fix it at 0; None for each task's default.
        batch_size: sequences per forward pass.
        include_path: folders with more task files.
        description: the description of the progress bar.

    Returns:
        For each task, its numeric metrics and standard errors. A tag is reported as its tasks, a group as one entry.

    Raises:
        UserError: a task is unknown (the message suggests similar names), its YAML file or data have a mistake, or its
            data is not cached and the hub cannot be reached.
    """
    if problems := check_tasks(tasks, include_path):
        raise UserError("\n".join(render(problems)))
    manager = _manager(tasks, include_path)
    offline = True if _on_disk(manager, tasks) else None
    with _seeded(), hub_access(offline=offline), _quiet(description), eval_mode(model):
        from lm_eval.evaluator import evaluate

        loaded = _load(manager, tasks)
        for name, task in loaded["tasks"].items():
            _make_ready(task, name, tokenizer, num_fewshot)
        live = _live_model(model, tokenizer, batch_size)
        examples = limits(manager, loaded, tasks, limit, total_limit)
        results = evaluate(live, loaded, **examples, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=False)
    assert results is not None, "lm-eval returns results on the first process only"
    metrics = {**results["results"], **results.get("groups", {})}
    return {name: _numbers(metrics[name]) for name in _reported(manager, tasks) if name in metrics}


def check_tasks(tasks: Sequence[str] | None, include_path: IncludePath = None) -> list[Problem]:
    """Return the problems of task names. Reading lm-eval's index takes seconds, so it is read only if needed.

    Args:
        tasks: names of tasks; None for all tasks that `include_path` defines.
        include_path: folders with more task files.
    """
    problems = _check_folders(include_path)
    if tasks is None:
        if not problems and not folder_tasks(include_path):
            text = "none of its YAML files defines a task; a task file has a line `task: <name>`."
            problems.append(Problem("evaluation.include_path", text, include_path))
        return problems
    local = _local_tasks(include_path).all_tasks if include_path is not None else ()
    unknown = [task for task in tasks if task not in (*HELDOUT_TASKS, *local)]
    if not unknown:
        return problems
    known = [*_all_tasks(_folders(include_path)).all_tasks, *HELDOUT_TASKS]
    for task in dict.fromkeys(unknown):
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists all tasks."
            problems.append(Problem("evaluation.tasks", f"lm-eval has no task {task!r}; {hint}"))
    return problems


def folder_tasks(include_path: IncludePath) -> list[str]:
    """Return the names of the tasks that the YAML files in some folders define, without groups and tags."""
    return list(_local_tasks(include_path).all_subtasks)


def _check_folders(include_path: IncludePath) -> list[Problem]:
    """Return the problems of task files that are not valid YAML; lm-eval's index skips them silently."""
    problems = []
    for path in (path for folder in _folders(include_path) for path in sorted(Path(folder).rglob("*.yaml"))):
        try:
            check_yaml(path)
        except Exception as error:  # a parser, or a file that it includes, may raise anything
            text = f"{path} cannot be read: {' '.join(str(error).split())}"
            problems.append(Problem("evaluation.include_path", text))
    return problems


def _folders(include_path: IncludePath) -> tuple[str, ...]:
    if include_path is None:
        return ()
    return tuple(map(str, [include_path] if isinstance(include_path, str | Path) else include_path))


def _manager(tasks: Sequence[str], include_path: IncludePath) -> Any:
    """Return an index with the tasks: that of the folders if they define all of them, because it is read faster."""
    local = _local_tasks(include_path)
    # A group in these folders may be made of lm-eval's tasks.
    return local if set(tasks) <= set(local.all_subtasks) else _all_tasks(_folders(include_path))


def _on_disk(manager: Any, tasks: Sequence[str]) -> bool:
    """Return whether all tasks read local files, so that nothing is requested from the hub."""
    files = [task_settings(manager, task) for task in tasks]
    return all(f.get("dataset_path") in FILE_FORMATS and "://" not in str(f.get("dataset_kwargs")) for f in files)


def _local_tasks(include_path: IncludePath) -> Any:
    """Return an index of the tasks in some folders, without lm-eval's."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(_folders(include_path)), include_defaults=False)


@functools.lru_cache(maxsize=4)
def _all_tasks(folders: tuple[str, ...]) -> Any:
    """Return an index that includes lm-eval's 14,000 tasks; cached, because reading it takes ten seconds."""
    from lm_eval.tasks import TaskManager

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)  # no warning if a task in the folders replaces one of lm-eval's
    try:
        return TaskManager(include_path=list(folders))
    finally:
        logger.setLevel(level)


def _load(manager: Any, tasks: Sequence[str]) -> Any:
    """Load tasks with their data.

    Raises:
        UserError: the data is not cached and the hub cannot be reached.
    """
    names = list(dict.fromkeys(tasks))
    try:
        return manager.load(names)
    except (OSError, ValueError) as error:
        text = (str(error).splitlines() or [""])[0].rstrip(".")
        if isinstance(error, ConnectionError) or "OfflineMode" in text or "offline" in text:
            raise UserError(
                f"evaluation.tasks={','.join(tasks)}: {text}; the hub cannot be reached and their data is not in the "
                "cache: check the network, or use evaluation=heldout or evaluation=none."
            ) from error
        _name_culprit(manager, names)
        raise
    except (Exception, SystemExit):  # from the YAML, the functions or the data of a task
        _name_culprit(manager, names)
        raise


def _name_culprit(manager: Any, names: Sequence[str]) -> None:
    """Load tasks one by one.

    Raises:
        UserError: one of them cannot be loaded.
    """
    for name in names:
        with naming(name, task_settings(manager, name)):
            manager.load([name])


def check_local_tasks(
    tasks: Sequence[str] | None, include_path: IncludePath, num_fewshot: int | None = 0
) -> list[Problem]:
    """Return the mistakes in tasks that read local files. They are built as for an evaluation, without a model.

    Args:
        tasks: names of tasks without problems of `check_tasks`; None for all tasks that `include_path` defines.
        include_path: folders with task files.
        num_fewshot: examples in the prompt.
    """
    if include_path is None:
        return []
    manager, problems = _local_tasks(include_path), []
    names = list(manager.all_subtasks) if tasks is None else [name for name in tasks if name in manager.all_subtasks]
    with hub_access(offline=True), _quiet("checking tasks"):
        for name in (name for name in names if _on_disk(manager, [name])):
            try:
                with naming(name, task_settings(manager, name)):
                    [task] = manager.load([name])["tasks"].values()
                    _set_fewshot(task, num_fewshot)
                check_documents(task, name, CHECKED)
            except UserError as error:
                problems.append(Problem("", str(error)))
    return problems


def _make_ready(task: Any, name: str, tokenizer: PreTrainedTokenizerBase, num_fewshot: int | None) -> None:
    """Give a loaded task its examples, and let its errors name it.

    Raises:
        UserError: the examples cannot be set, or the tokenizer lacks a token that the task needs.
    """
    with naming(name):
        _set_fewshot(task, num_fewshot)
    if task.OUTPUT_TYPE == "generate_until" and tokenizer.eos_token_id is None:
        raise UserError(
            f"evaluation.tasks: {name}: the task generates text, but the tokenizer has no eos token, at which it would "
            "end. Set eos_token in the model's tokenizer_config.json, or leave the task out."
        )
    name_errors(task, name)


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    fixed = task.get_config("num_fewshot")
    if num_fewshot is not None and fixed != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif fixed is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)  # lm-eval's default, so that figures can be compared with published ones


def _live_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    device = decoder.device(model).type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    ends = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    rows = embedding_rows(model.config)
    lm = HFLM(
        pretrained=model,
        prefix_token_id=None if ends else _line_break(tokenizer),
        tokenizer=_with_padding(tokenizer, rows),
        batch_size=batch_size,
        softmax_dtype="float32",
        mixed_precision_dtype=autocast,
    )
    check_encoded(lm, lambda highest: require_rows(highest, rows, tokenizer, "the prompts of evaluation.tasks"))
    return lm


def _with_padding(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> PreTrainedTokenizerBase:
    """Return a copy, to which lm-eval may add a padding token. The model's embedding has a row for its padding."""
    copied = copy.deepcopy(tokenizer)
    special = (copied.pad_token_id, copied.unk_token_id, copied.eos_token_id)  # the order in which lm-eval takes them
    if rows is not None and next((token for token in special if token is not None), rows) >= rows:
        copied.pad_token_id = filler(tokenizer, rows)
    return copied


def _line_break(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that stands before a text, where lm-eval puts bos or eos, for a tokenizer that has neither."""
    ids = tokenizer.encode("\n", add_special_tokens=False)
    return ids[-1] if ids else 0


def _reported(manager: Any, tasks: Sequence[str]) -> list[str]:
    """Return the names to report, with each tag replaced by its tasks."""
    names: list[str] = []
    for task in tasks:
        names += tasks_of_tag(manager, task) or [task]
    return list(dict.fromkeys(names))


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Return lm-eval's metrics under short names: "acc,none" becomes acc, and "acc,<filter>" becomes acc_<filter>."""
    numbers = {}
    for key, value in metrics.items():
        name, _, filter_name = key.partition(",")
        if filter_name and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            numbers[name if filter_name == "none" else f"{name}_{filter_name}"] = float(value)
    return numbers


@contextmanager
def _seeded() -> Iterator[None]:
    """Set lm-eval's seeds inside the context and restore the generators, so that training is not affected."""
    from lightning.pytorch.utilities.seed import isolate_rng  # here, because a refused command should not import it

    with isolate_rng(include_cuda=torch.cuda.is_available()):
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        yield


@contextmanager
def _quiet(description: str) -> Iterator[None]:
    """Silence the libraries' bars and warnings inside the context, and show one bar that counts model requests."""
    import datasets

    with ExitStack() as stack:
        for name in ("lm_eval", "datasets", "transformers"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if not datasets.are_progress_bars_disabled():
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        stack.enter_context(requests_shown(stack.enter_context(progress(description))))
        yield
