"""Checks of a run's lm-eval tasks, without a model."""

from __future__ import annotations

from collections.abc import Iterator

from recondense.config.problems import Problem
from recondense.config.schema import EvaluationConfig


def check_run_tasks(evaluation: EvaluationConfig) -> Iterator[Problem]:
    """Yield unknown tasks, and mistakes in tasks of local files.

    lm-eval is imported only if tasks are named, because that takes seconds.
    """
    if not evaluation.tasks and (evaluation.include_path is None or evaluation.tasks is not None):
        return
    from recondense.evaluation.lm_eval import check_local_tasks, check_tasks

    problems = check_tasks(evaluation.tasks, evaluation.include_path)
    yield from problems or check_local_tasks(evaluation.tasks, evaluation.include_path, evaluation.num_fewshot)
