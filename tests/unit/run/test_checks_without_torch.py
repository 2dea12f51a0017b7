"""Checks of a run that need no model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from recondense.config.schema import from_dict
from recondense.config.stages import require_stages
from recondense.run.checks_without_torch import check_quickly
from recondense.run.resolved_run import Run


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = from_dict(
        {"model": {"pretrain": {}}, "run_dir": str(tmp_path), "trainer": {"strategy": "deepspeed_zero2"}}
    )
    run = Run(config, require_stages(config))
    assert list(check_quickly(run)) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [problem] = check_quickly(run)
    assert str(problem).startswith(
        "trainer.strategy=deepspeed_zero2: DeepSpeed is not installed. Install it with pip install"
    )
