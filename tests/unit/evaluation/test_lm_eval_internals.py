"""What recondense does with lm-eval's internals; tests/contract/test_private_apis.py says which name has moved."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from recondense.evaluation import lm_eval_internals
from recondense.evaluation.lm_eval_internals import check_yaml, requests_shown, task_settings, tasks_of_tag
from recondense.progress import progress


def test_a_task_file_is_read_as_the_index_does(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text("task: one\ntest_split: !function utils.split\n")
    check_yaml(path)
    path.write_text("task: [one\n")
    with pytest.raises(yaml.YAMLError):
        check_yaml(path)


def test_entries_of_the_index(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    for name in ("two", "one"):
        content = {"task": name, "tag": "numbers", "dataset_path": "json"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert tasks_of_tag(manager, "numbers") == ["one", "two"] and tasks_of_tag(manager, "one") is None
    assert task_settings(manager, "one")["dataset_path"] == "json" and task_settings(manager, "numbers") == {}


def test_progress_bars_of_lm_eval_are_replaced_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: list[Any] = [importlib.import_module(name) for name in lm_eval_internals.MODULES_WITH_BARS]
    before = [module.tqdm for module in modules]
    monkeypatch.delenv(lm_eval_internals.NO_PROCESSES, raising=False)
    with pytest.raises(RuntimeError), progress("lm-eval") as bar, requests_shown(bar):
        assert list(modules[0].tqdm([1, 2], desc="texts")) == [1, 2] and bar.completed == 0
        for module in modules:
            shown = module.tqdm(total=2, desc="requests")
            shown.update(1)
            shown.update()
            shown.close()
        assert bar.completed == 6 and os.environ[lm_eval_internals.NO_PROCESSES]
        raise RuntimeError
    assert [module.tqdm for module in modules] == before and lm_eval_internals.NO_PROCESSES not in os.environ
