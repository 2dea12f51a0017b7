"""What further processes and jobs of a command get from Hydra's config."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from recondense.run.command_line import child_command
from recondense.run.search_path import as_written


def test_overrides_keep_what_they_take_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolved value could be of another type, or have special characters."""
    monkeypatch.setenv("FOLDER", "runs/lr=1")
    words = ['seed="${oc.decode:${oc.env:SEED}}"', "data.train.path=${oc.env:FOLDER}"]
    hydra = {"overrides": {"task": words, "hydra": []}, "runtime": {"config_sources": []}, "job": {"config_name": "a"}}
    context = OmegaConf.create(hydra)
    assert as_written(context.overrides.task) == tuple(words)
    assert set(words) <= set(child_command(context))
    assert as_written(None) == ()
