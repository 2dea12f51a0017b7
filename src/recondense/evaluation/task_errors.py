"""Mistakes in lm-eval tasks: whatever lm-eval raises while it reads one is a sentence that names the task.

A task is a YAML file with templates, functions and data of its author, so that anything may be raised. Only calls of
lm-eval stand inside these handlers; the model is not called there.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from recondense.errors import UserError
from recondense.evaluation.heldout_tasks import HELDOUT_TASKS

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors of the disk, not of a task
METHODS = ("build_all_requests", "apply_filters", "process_results")  # of a task, which `evaluate` calls
MOST_WORDS = 60  # of an error's text


@contextmanager
def naming(task: str) -> Iterator[None]:
    """Turn every error inside into one that names the task. Errors of our own tasks are defects and stay."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if task in HELDOUT_TASKS or (isinstance(error, OSError) and error.errno in NO_ROOM):
            raise
        text = f"evaluation.tasks: {task}: {reason(error)}. Check the task's YAML file, its functions and its data."
        raise UserError(text) from error


def reason(error: BaseException) -> str:
    """Return what an error says, in one line, with its type if that says more."""
    words = str(error).split()
    text = " ".join(words[:MOST_WORDS]) + (" ..." if len(words) > MOST_WORDS else "")
    if isinstance(error, KeyError):
        return f"there is no {text}"
    return f"{type(error).__name__}: {text.rstrip('.')}" if text else type(error).__name__


def name_errors(task: Any, name: str) -> None:
    """Let errors of a loaded task name it, in whatever `lm_eval.evaluator.evaluate` calls."""

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with naming(name):
                return call(*args, **kwargs)

        return run

    for method in METHODS:
        setattr(task, method, guarded(getattr(task, method)))
    aggregation = guarded(task.aggregation)

    def guarded_aggregation() -> dict[str, Any]:
        """Return the functions that combine a metric's values; lm-eval finds the error of its functions by identity."""
        return {
            metric: combine if getattr(combine, "__module__", "").startswith("lm_eval.") else guarded(combine)
            for metric, combine in aggregation().items()
        }

    task.aggregation = guarded_aggregation


def check_documents(task: Any, name: str, most: int) -> None:
    """Build the requests of a task's first documents, and check what they ask.

    Args:
        task: a loaded task.
        name: its name.
        most: number of documents.

    Raises:
        UserError: the task cannot be built, or has no documents, or asks what cannot be answered.
    """
    with naming(name):
        task.build_all_requests(limit=most, rank=0, world_size=1)
        incomplete = [metric for metric, combine in task.aggregation().items() if not callable(combine)]
        documents = list({instance.doc_id: instance.doc for instance in task.instances}.items())
    if not documents:
        raise UserError(
            f"evaluation.tasks: {name}: there are no documents in its data. Check the split and process_docs."
        )
    if incomplete:
        text = f"the metric {incomplete[0]} has no aggregation. Name one of lm-eval, such as mean, or a function"
        raise UserError(f"evaluation.tasks: {name}: {text}.")
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for number, document in documents:
        with naming(name):
            choices, target = task.doc_to_choice(document), task.doc_to_target(document)
        if problem := _choice_problem(choices, target):
            raise UserError(f"evaluation.tasks: {name}: document {number}: {problem}")


def _choice_problem(choices: Any, target: Any) -> str:
    """Return what is wrong with the choices of a document and its answer; empty if nothing is."""
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        return f"doc_to_choice gives {choices!r}, which is no list. Give a list of texts."
    if len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        return f"doc_to_choice gives {list(choices)!r}. Give at least two texts."
    for answer in target if isinstance(target, list | tuple) else [target]:
        if isinstance(answer, str) and answer not in choices:
            return f"doc_to_target gives {answer!r}, which is none of the choices."
        if not isinstance(answer, str) and not (isinstance(answer, int) and 0 <= answer < len(choices)):
            return f"doc_to_target gives {answer!r}. Give the number of a choice, from 0 to {len(choices) - 1}."
    return ""
