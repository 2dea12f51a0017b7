"""lm-eval during training: at the right steps, and without an effect on training."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_trainer import Module, fit
from torch import nn

from recondense.callbacks.lm_eval import LmEval, every_steps
from recondense.callbacks.profile import ProfileMemoryAndSpeed
from recondense.evaluation import lm_eval


@pytest.fixture()
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for lm-eval: draws from every generator, changes modes, and notes how it was called."""
    recorded: list[dict[str, Any]] = []

    def run_tasks(model: nn.Module, tokenizer: Any, tasks: Sequence[str], **settings: Any) -> Any:
        random.random(), np.random.rand(), torch.rand(1)
        model.eval()
        recorded.append({"tokenizer": tokenizer, "tasks": tasks, **settings})
        return {task: {"acc": float(len(recorded)), "acc_stderr": 0.5} for task in tasks}

    monkeypatch.setattr(lm_eval, "run_tasks", run_tasks)
    return recorded


class TestLmEval:
    def test_evaluates_before_training_every_n_optimiser_steps_and_at_the_end(
        self, calls: list[Any], tmp_path: Path
    ) -> None:
        module = Module()
        settings: dict[str, Any] = {
            "limit": 3, "total_limit": 2, "num_fewshot": 1, "batch_size": 4, "include_path": "folder"
        }  # fmt: skip
        callback = LmEval(["a", "b"], every_n_steps=2, **settings)
        _, recorder = fit(module, [callback], tmp_path, num_batches=10, accumulate_grad_batches=2)
        assert recorder.steps("recovery/a/acc") == recorder.steps("recovery/b/acc_stderr") == [0, 2, 4, 5]
        assert {step: results["a"]["acc"] for step, results in module.task_results.items()} == {0: 1, 2: 2, 4: 3, 5: 4}
        assert calls[0] == {"tokenizer": "tokenizer", "tasks": ["a", "b"], **settings}

    def test_the_last_step_is_evaluated_once(self, calls: list[Any], tmp_path: Path) -> None:
        fit(Module(), [LmEval(["a"], every_n_steps=3)], tmp_path)
        assert len(calls) == 3, "steps 0, 3 and 6"

    @pytest.mark.parametrize(
        ("every_n_steps", "at_start", "at_end", "steps"),
        [
            (0, True, True, [0, 6]),
            (0, False, False, []),
            (4, False, True, [4, 6]),
            (4, True, False, [0, 4]),
            ("auto", True, True, [0, 6]),
        ],
    )
    def test_start_and_end_can_be_left_out(
        self, every_n_steps: Any, at_start: bool, at_end: bool, steps: list[int], calls: list[Any], tmp_path: Path
    ) -> None:
        callback = LmEval(["a"], every_n_steps=every_n_steps, at_start=at_start, at_end=at_end)
        _, recorder = fit(Module(), [callback], tmp_path)
        assert recorder.steps("recovery/a/acc") == steps

    def test_auto_has_at_most_five_points_that_are_not_too_near(self) -> None:
        for steps, interval in {1: 25, 60: 25, 100: 25, 200: 50, 1250: 313, 20_000: 5000}.items():
            assert every_steps(steps) == interval
            assert len({0, *range(interval, steps + 1, interval), steps}) <= 5
        assert every_steps(float("inf")) == 0

    def test_the_time_of_an_evaluation_can_be_counted(self, calls: list[Any], tmp_path: Path) -> None:
        entered: list[int] = []

        @contextmanager
        def timed() -> Iterator[None]:
            entered.append(len(calls))
            yield

        fit(Module(), [LmEval(["a"], every_n_steps=4, timed=timed)], tmp_path)
        assert entered == [0, 1, 2]

    def test_training_is_not_affected(self, calls: list[Any], tmp_path: Path) -> None:
        plain, evaluated = Module(), Module()
        fit(plain, [], tmp_path)
        fit(evaluated, [LmEval(["a"], every_n_steps=1), ProfileMemoryAndSpeed(prompt_length=4, new_tokens=1)], tmp_path)
        assert len(calls) == 7
        assert evaluated.model.training
        for name, value in plain.state_dict().items():
            assert torch.equal(value, evaluated.state_dict()[name]), name

    def test_runs_in_the_precision_of_the_trainer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []

        def run_tasks(*_: Any, **__: Any) -> dict[str, Any]:
            seen.append(torch.is_autocast_enabled("cpu"))
            return {}

        monkeypatch.setattr(lm_eval, "run_tasks", run_tasks)
        fit(Module(), [LmEval(["a"])], tmp_path, precision="bf16-mixed")
        assert seen == [True, True]

    def test_without_tasks_nothing_runs(self, calls: list[Any], tmp_path: Path) -> None:
        for tasks in (None, ()):
            fit(Module(), [LmEval(tasks, every_n_steps=1)], tmp_path)
        assert calls == []
        with pytest.raises(ValueError, match="every_n_steps is -1"):
            LmEval(["a"], every_n_steps=-1)

    def test_a_resumed_training_keeps_results_and_does_not_repeat_them(self, calls: list[Any], tmp_path: Path) -> None:
        before = LmEval(["a"], every_n_steps=2, at_end=False)
        fit(Module(), [before], tmp_path)
        after, module = LmEval(["a"], every_n_steps=2, at_end=False), Module()
        after.load_state_dict(before.state_dict())
        fit(module, [after], tmp_path)
        assert sorted(module.task_results) == [0, 2, 4, 6] and len(calls) == 4
