"""Checks of a run that need no model: its folder, and how two configs differ."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from recondense.config.problems import render
from recondense.config.schema import Config, RecoveryConfig, from_dict
from recondense.config.stages import require_stages
from recondense.run.checks_without_torch import check_quickly, check_run_folder, differences
from recondense.run.resolved_run import Run


def messages(config: Config, stored: Config | None) -> list[str]:
    return render(check_run_folder(config, stored))


def test_differences_name_dotted_settings() -> None:
    one = Config(seed=1, recovery=RecoveryConfig(steps=2)).identity()
    assert differences(one, Config().identity()) == ["recovery.steps", "seed"]


def test_the_run_folder_of_the_same_config_is_resumed(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path))
    assert messages(config, None) == []
    (tmp_path / ".lock").touch()
    assert messages(config, None) == []
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert messages(config, config) == []
    other = dataclasses.replace(config, seed=3)
    assert "different: seed" in messages(other, config)[0]
    assert messages(dataclasses.replace(other, overwrite=True), config) == []


def test_a_run_resumes_with_another_engine(tmp_path: Path) -> None:
    """Checkpoints do not depend on the engine, so it is not part of a run's identity, as its processes are not."""
    one = from_dict({"run_dir": str(tmp_path), "trainer": {"strategy": "auto"}})
    (tmp_path / "config.yaml").write_text(one.to_yaml())
    for strategy in ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload"):
        other = from_dict({"run_dir": str(tmp_path), "trainer": {"strategy": strategy, "devices": 2}})
        assert other.run_hash() == one.run_hash() and messages(other, one) == []
    other = from_dict({"run_dir": str(tmp_path), "trainer": {"strategy": "ddp", "precision": "bf16-true"}})
    assert "different: trainer.precision" in messages(other, one)[0]


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
