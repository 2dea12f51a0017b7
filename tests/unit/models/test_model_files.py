"""Files of models on the hub are read from its cache, by revision, without a network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
from support.hub_cache import in_hub_cache

from recondense.config.schema import ModelConfig
from recondense.models.model_files import model_file, read_history
from recondense.operations import Condense, Prune
from recondense.plan import History, Plan

FIRST, SECOND = Condense(1, (3, 0), (0.4, 0.2), None), Prune(0, (0, 1))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_model_of_the_hub_has_the_history_of_its_revision(tmp_path: Path, cache: Path) -> None:
    for revision, operation in (("main", FIRST), ("second", SECOND)):
        Plan("tiny", (operation,)).save(tmp_path / revision / "plan.json")
        in_hub_cache(cache, tmp_path / revision, "me/mine", revision)
    commits = [path.name for path in sorted((cache / "models--me--mine" / "snapshots").iterdir())]
    assert len(commits) == 2
    assert read_history(ModelConfig(path="me/mine")) == History((FIRST,))
    assert read_history(ModelConfig(path="me/mine", revision="second")) == History((SECOND,))
    assert {read_history(ModelConfig(path="me/mine", revision=commit)) for commit in commits} == {
        History((FIRST,)), History((SECOND,))
    }  # fmt: skip
    assert read_history(ModelConfig(path=str(tmp_path / "main"))) == History((FIRST,))


def test_a_missing_file_is_none(tmp_path: Path, cache: Path) -> None:
    Plan("tiny", (FIRST,)).save(tmp_path / "main" / "plan.json")
    in_hub_cache(cache, tmp_path / "main", "me/mine")
    assert model_file("me/mine", "plan.json") is not None
    assert model_file("me/mine", "adapter_config.json") is None
    assert model_file("me/mine", "plan.json", "no-such-revision") is None
    assert model_file("nobody/no-such-model", "plan.json") is None
    assert model_file(tmp_path / "main", "adapter_config.json") is None
    assert read_history(ModelConfig(path="nobody/no-such-model")) == read_history(ModelConfig()) == History()
