"""Mistakes in lm-eval tasks: whatever lm-eval raises while it reads one is a sentence that names the task.

A task is a YAML file with templates, functions and data of its author, so that anything may be raised. Only calls of
lm-eval stand inside these handlers; the model is not called there.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any

from recondense.errors import UserError
from recondense.evaluation.heldout_tasks import HELDOUT_TASKS
from recondense.evaluation.task_data import check_unicode, invalid_text, missing_split
from recondense.models.library_errors import is_exit, reason_of

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors of the disk, not of a task
MOST_WORDS = 60  # of an error's text
UNKNOWN = (-1, -100)  # answers in data without answers
TRIED = 2  # documents that are scored with made up responses
NO_DOCUMENTS = "there are no documents in its data. Check the split and process_docs"

log = logging.getLogger(__name__)


@contextmanager
def naming(task: str, settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turn every error inside into one that names the task. Errors of our own tasks are defects and stay.

    Args:
        task: the name of the task.
        settings: the settings in its file, for the reason of an error.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if task in HELDOUT_TASKS or (isinstance(error, OSError) and error.errno in NO_ROOM):
            raise
        if isinstance(error, SystemExit) and not is_exit(error):
            raise
        text = f"evaluation.tasks: {task}: {reason(error, settings or {})}."
        raise UserError(f"{text} Check the task's YAML file, its functions and its data.") from error


def reason(error: BaseException, settings: Mapping[str, Any]) -> str:
    """Return what an error says, in one line, with its type if that says more."""
    if isinstance(error, SystemExit):
        return reason_of(error)
    if isinstance(error, StopIteration):
        return "there are no documents in its data"
    from datasets.exceptions import DatasetGenerationError  # late: few commands need it

    if isinstance(error, UnicodeError | DatasetGenerationError) and (text := invalid_text(settings)):
        return text
    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:  # it says nothing itself
        error = error.__cause__
    words = str(error).split()
    if isinstance(error, KeyError) and len(sentence := str(*error.args[:1]).split()) > 3:  # no key
        return " ".join(sentence[:MOST_WORDS]).rstrip(".")
    text = " ".join(words[:MOST_WORDS]) + (" ..." if len(words) > MOST_WORDS else "")
    if isinstance(error, KeyError):
        return _unknown_metrics(settings) if error.args == (None,) else missing_split(error) or f"there is no {text}"
    return f"{type(error).__name__}: {text.rstrip('.')}" if text else type(error).__name__


def _unknown_metrics(settings: Mapping[str, Any]) -> str:
    """Return the sentence about metrics whose aggregation is neither given nor known, for which lm-eval looks."""
    from lm_eval.api.registry import get_metric_aggregation

    listed = [entry for entry in settings.get("metric_list") or () if isinstance(entry, Mapping)]
    names = [str(entry.get("metric")) for entry in listed if "aggregation" not in entry]
    unknown = [name for name in names if get_metric_aggregation(name) is None]
    if not unknown:
        return "a metric in metric_list is none of lm-eval's, and has no aggregation"
    return f"lm-eval has no metric {' or '.join(unknown)}; name one of its own, such as acc, or give an aggregation"


def name_errors(task: Any, name: str) -> None:
    """Let errors of a loaded task name it, in whatever `lm_eval.evaluator.evaluate` calls."""

    settings = {"dataset_kwargs": task.get_config("dataset_kwargs")}

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with naming(name, settings):
                return call(*args, **kwargs)

        return run

    build = task.build_all_requests

    def checked_build(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        check_unicode(task, name)

    task.build_all_requests, task.apply_filters = guarded(checked_build), guarded(task.apply_filters)
    process_results, aggregation = guarded(task.process_results), guarded(task.aggregation)

    def guarded_results(document: Any, results: Any) -> Any:
        scores = process_results(document, results)
        if not isinstance(scores, Mapping):
            text = f"process_results gives {scores!r}, which is no object of metrics and their values."
            raise UserError(f"evaluation.tasks: {name}: {text}")
        return scores

    task.process_results = guarded_results
    task.aggregation = lambda: _Aggregations(name, aggregation())


class _Aggregations(dict[str, Callable[..., Any]]):
    """The functions that combine the values of a task's metrics; a metric without one is averaged, as by lm-eval.

    Args:
        task: the name of the task.
        functions: the functions of its metrics.
    """

    def __init__(self, task: str, functions: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__({metric: _Aggregation(task, metric, combine) for metric, combine in functions.items()})
        self._task = task

    def __missing__(self, metric: str) -> Callable[..., Any]:
        from lm_eval.api.registry import get_aggregation

        return _Aggregation(self._task, metric, get_aggregation("mean"))


class _Aggregation:
    """A function that combines a metric's values, whose errors name the task.

    It equals the function: lm-eval looks up by it how to estimate the standard error.

    Args:
        task: the name of the task.
        metric: the name of the metric.
        combine: the function.
    """

    def __init__(self, task: str, metric: str, combine: Callable[..., Any]) -> None:
        self._task, self._metric, self._combine = task, metric, combine

    def __call__(self, values: Any) -> Any:
        with naming(self._task):
            combined = self._combine(values)
        # lm-eval computes with what its own functions return.
        if getattr(self._combine, "__module__", "").startswith("lm_eval.") and not _is_number(combined):
            text = f"the values of the metric {self._metric} are no numbers: {str(values[0])[:80]!r}."
            raise UserError(f"evaluation.tasks: {self._task}: {text}")
        return combined

    def __eq__(self, other: object) -> bool:
        return bool(self._combine == other)

    def __hash__(self) -> int:
        return hash(self._combine)


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) or getattr(value, "shape", None) == ()


def check_documents(task: Any, name: str, most: int) -> None:
    """Build the requests of a task's first documents, check what they ask, and score made up responses.

    Args:
        task: a loaded task.
        name: its name.
        most: number of documents.

    Raises:
        UserError: the task cannot be built, or has no documents, or asks what cannot be answered or scored.
    """
    with naming(name):
        task.build_all_requests(limit=most, rank=0, world_size=1)
        check_unicode(task, name)
        incomplete = [metric for metric, combine in task.aggregation().items() if not callable(combine)]
        documents = list({instance.doc_id: instance.doc for instance in task.instances}.items())
    if not documents:
        raise UserError(f"evaluation.tasks: {name}: {NO_DOCUMENTS}.")
    if incomplete:
        text = f"the metric {incomplete[0]} has no aggregation. Name one of lm-eval, such as mean, or a function"
        raise UserError(f"evaluation.tasks: {name}: {text}.")
    if task.OUTPUT_TYPE == "multiple_choice":
        _check_choices(task, name, documents)
    if _scored_by_lm_eval(task):
        name_errors(task, name)
        _check_metrics(task, name)


def _check_choices(task: Any, name: str, documents: Sequence[tuple[int, Any]]) -> None:
    """Check the choices of documents, and their answers unless the task has its own way to score them.

    Raises:
        UserError: the choices are no list of texts, or the answer is none of them.
    """
    function = "doc_to_text" if task.multiple_input else "doc_to_target"  # of the answer
    scored, unanswered, single = task.get_config("process_results") is None, 0, 0
    for number, document in documents:
        with naming(name):
            choices = task.doc_to_choice(document)
            answer = getattr(task, function)(document) if scored else 0
        problem = _choices_problem(choices) or (_answer_problem(choices, answer, function) if scored else "")
        if problem:
            raise UserError(f"evaluation.tasks: {name}: document {number}: {problem}")
        unanswered += scored and answer in UNKNOWN
        single += len(choices) == 1
    if unanswered:
        text = "evaluation.tasks: %s: %d of its first %d documents have no answer (%s is -1) and count as wrong"
        log.warning(text, name, unanswered, len(documents), function)
    if single:
        text = "evaluation.tasks: %s: %d of its first %d documents have a single choice, which any model takes"
        log.warning(text, name, single, len(documents))


def _choices_problem(choices: Any) -> str:
    """Return what is wrong with the choices of a document; empty if nothing is."""
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        return f"doc_to_choice gives {choices!r}, which is no list. Give a list of texts."
    if not choices or not all(isinstance(choice, str) for choice in choices):
        return f"doc_to_choice gives {list(choices)!r}. Give at least two texts."
    return ""


def _answer_problem(choices: Sequence[str], target: Any, function: str) -> str:
    """Return what is wrong with a document's answer, which a function gives; empty if nothing is."""
    for answer in target if isinstance(target, list | tuple) else [target]:
        if isinstance(answer, str) and answer not in choices:
            return f"{function} gives {answer!r}, which is none of the choices."
        known = isinstance(answer, str) or (isinstance(answer, int) and 0 <= answer < len(choices))
        if not known and answer not in UNKNOWN:
            return f"{function} gives {answer!r}. Give the number of a choice, from 0 to {len(choices) - 1}."
    return ""


def _scored_by_lm_eval(task: Any) -> bool:
    """Return whether only lm-eval's functions score a task. Functions of its author may expect certain responses."""
    metrics, filters = task.get_config("metric_list") or (), task.get_config("filter_list") or ()
    return (
        task.get_config("process_results") is None
        and not any(callable(value) for entry in metrics for value in entry.values())
        and not any(callable(value) for entry in filters for step in entry["filter"] for value in step.values())
    )


def _check_metrics(task: Any, name: str) -> None:
    """Check the metrics of a task by scoring made up responses.

    Raises:
        UserError: a metric does not exist, or does not fit the task.
    """
    from lm_eval.api.registry import get_metric

    for entry in task.get_config("metric_list") or ():
        with naming(name):
            exists = get_metric(entry["metric"], entry.get("hf_evaluate", False)) is not None
        if not exists:
            text = f"lm-eval has no metric {entry['metric']}; name one of its own, such as acc"
            raise UserError(f"evaluation.tasks: {name}: {text}.")
    scored = _try_scores(task)
    if without := [metric for metric in task.aggregation() if metric not in scored]:
        text = "evaluation.tasks: %s: %s is not measured in a task with output_type %s"
        log.warning(text, name, " or ".join(without), task.OUTPUT_TYPE)


def _try_scores(task: Any) -> set[str]:
    """Score made up responses to some documents, so that metrics that do not fit the task show without a model.

    Args:
        task: a loaded task, whose errors name it.

    Returns:
        the metrics that lm-eval has computed.
    """
    task.build_all_requests(limit=TRIED, rank=0, world_size=1)
    documents = {instance.doc_id: instance.doc for instance in task.instances}
    for instance in task.instances:
        score = -1.0 - instance.idx
        responses = {"generate_until": "a", "loglikelihood_rolling": score}
        instance.resps = [responses.get(instance.request_type, (score, False))] * instance.repeats
    task.apply_filters()
    values: dict[str, list[Any]] = {}
    for name in task.instances[0].filtered_resps:
        for number, document in documents.items():
            asked = [instance for instance in task.instances if instance.doc_id == number]
            scores = task.process_results(document, [instance.filtered_resps[name] for instance in asked])
            for metric, value in scores.items():
                values.setdefault(metric, []).append(value)
    for metric, combined in values.items():
        task.aggregation()[metric](combined)
    return set(values)
