"""The plan is drawn once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.small_trainer import Module, fit

from recondense.callbacks.plan_logging import PlanLogging
from recondense.operations import Condense
from recondense.plan import Plan


class TestPlanLogging:
    def test_draws_the_plan_once(self, tmp_path: Path) -> None:
        plan = Plan(model="tiny", operations=(Condense(1, (3, 0), (0.1, 0.2), None),))
        callback = PlanLogging(tmp_path / "run", export_folder=tmp_path / "model")
        fit(Module(plan), [callback], tmp_path)
        picture = tmp_path / "run" / "plan.png"
        assert picture.exists()
        picture.unlink()
        fit(Module(plan), [callback], tmp_path)
        assert not picture.exists()

    def test_writes_nothing_without_a_plan(self, tmp_path: Path) -> None:
        for plan in (None, Plan(model="tiny")):
            fit(Module(plan), [PlanLogging(tmp_path / "run")], tmp_path)
        assert not (tmp_path / "run").exists()


def test_what_is_asked_of_a_module() -> None:
    # PlanLogging asks a module for `plan.operations` and `plan.to_dict()` only.
    callback = PlanLogging()
    trainer: Any = SimpleNamespace(loggers=[], default_root_dir=".")
    callback.on_fit_start(trainer, SimpleNamespace(plan=SimpleNamespace(operations=())))  # type: ignore[arg-type]
    assert callback.state_dict() == {"logged": False}
