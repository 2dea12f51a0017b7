"""A run's folder: inputs are never deleted, and an interrupted new start leaves all of the old run or none of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from recondense import files
from recondense.config.problems import Problem, render
from recondense.config.schema import Config, from_dict
from recondense.config.stages import require_stages
from recondense.errors import ConfigError
from recondense.run import run_folder
from recondense.run.resolved_run import Run
from recondense.run.run_folder import CONTENTS, begin, overwritten_inputs, repair


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    path = tmp_path / "out" / "run"
    for name in CONTENTS:
        if "." in name:
            path.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(f"old {name}")
        else:
            (path / name).mkdir(parents=True)
            (path / name / "file").write_text(f"old {name}")
    return path


def config(folder: Path, **settings: Any) -> Config:
    cache = {"cache_dir": str(folder.parent / "cache")}
    return from_dict({"run_dir": str(folder), "overwrite": True, **cache, **settings})


def overwritten(configs: Sequence[Config]) -> list[Problem]:
    return overwritten_inputs([Run(config, require_stages(config)) for config in configs])


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def data(**settings: Any) -> dict[str, Any]:
    return {"data": {"source": "texts", **settings}}


def stage(**settings: Any) -> dict[str, Any]:
    return {"recovery": {"objective": "distill", "stages": [{"name": "a", "steps": 1, **settings}]}}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("model.path", lambda path: {"model": {"path": path}}),
        ("model.tokenizer", lambda path: {"model": {"tokenizer": path}}),
        ("recovery.teacher_path", lambda path: {"recovery": {"teacher_path": path}}),
        ("evaluation.include_path", lambda path: {"evaluation": {"include_path": path}}),
        ("cache_dir", lambda path: {"cache_dir": path}),
        ("data.calibration.path", lambda path: data(calibration={"path": path})),
        ("data.train.path", lambda path: data(train={"path": path})),
        ("data.validation.path", lambda path: data(validation={"path": path})),
        ("data.dataset", lambda path: data(source="hub", dataset=path)),
        ("data.calibration.sources[1].path", lambda path: data(calibration={"sources": [{}, {"path": path}]})),
        ("data.calibration.sources[0].dataset", lambda path: data(calibration={"sources": [{"dataset": path}]})),
        ("recovery.stages[0].teacher_path", lambda path: stage(teacher="model", teacher_path=path)),
        ("recovery.stages[0].data.train.path", lambda path: stage(data={"source": "texts", "train": {"path": path}})),
        ("recovery.stages[0].data.dataset", lambda path: stage(data={"source": "hub", "dataset": path})),
    ],
)
def test_inputs_that_would_be_deleted_are_reported(
    folder: Path, name: str, settings: Callable[[str], dict[str, Any]]
) -> None:
    inside = folder / "model"
    [problem] = render(overwritten([config(folder, **settings(str(inside)))]))
    assert problem.startswith(f"{name}={inside}: ") and f"would delete {inside}." in problem
    around = str(folder.parent)
    [problem] = render(overwritten([config(folder, **settings(around))]))
    assert problem.startswith(f"{name}={around}: ") and f"the run in {folder}." in problem
    for path in (folder / "mine.jsonl", folder.parent / "mine.jsonl", folder.parent / "run-2"):  # nothing deletes these
        path.touch()
        assert overwritten([config(folder, **settings(str(path)))]) == []
    assert overwritten([replace(config(folder, **settings(str(inside))), overwrite=False)]) == []


def test_links_and_homes_are_followed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links into the folder, out of it, within an input, and to the folder itself."""
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder.parent)
    (tmp_path / "to-model").symlink_to("out/run/model")
    (tmp_path / "to-link").symlink_to(tmp_path / "to-model")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "weights").symlink_to("../out/run/model/file")
    (tmp_path / "elsewhere").mkdir()
    (folder / "work" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "again").symlink_to(folder / "work" / "link")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "to-run").symlink_to(folder)
    for path in (
        *("~/model", "run/model/file", "run/../run/model", tmp_path / "to-link", tmp_path / "hub"),
        *(folder / "work" / "link", tmp_path / "again", tmp_path / "to-run" / "model"),
    ):
        assert len(overwritten([config(folder, **data(dataset=str(path)))])) == 1, path
        assert len(overwritten([config(tmp_path / "to-run", **data(dataset=str(path)))])) == 1, path
    for path in (tmp_path / "elsewhere", tmp_path / "loop", "owner/name", ""):
        assert overwritten([config(folder, **data(dataset=str(path)))]) == [], path


def test_no_run_of_a_sweep_deletes_what_another_reads(folder: Path) -> None:
    reader = config(folder.parent / "run-2", model={"path": str(folder / "model")})
    assert overwritten([reader]) == []
    assert len(overwritten([reader, config(folder)])) == 1


def test_a_new_start_deletes_only_the_files_of_the_run(folder: Path) -> None:
    (folder / "mine.txt").write_text("mine")
    (folder / "checkpoints" / "file").unlink()
    (folder / "checkpoints").rmdir()
    (folder / "checkpoints").symlink_to(folder.parent)  # the link is deleted, and its target is not
    settings = config(folder)
    begin(replace(settings, overwrite=False), folder)
    assert (folder / "summary.json").exists() and (folder / "config.yaml").read_text() == "old config.yaml"
    begin(settings, folder)
    assert contents(folder) == {"mine.txt": "mine", "config.yaml": settings.to_yaml()}
    assert sorted(os.listdir(folder)) == ["config.yaml", "mine.txt"] and folder.parent.is_dir()


@pytest.mark.parametrize("name", ["stages", "work"])
def test_a_run_that_began_inside_after_the_checks_is_kept(folder: Path, name: str) -> None:
    inner = folder / name / "inner"
    inner.mkdir()
    for file in ("config.yaml", "inputs.json"):
        (inner / file).write_text("mine")
    before = contents(folder)
    with pytest.raises(ConfigError, match=rf"another run is in {inner}"):
        begin(config(folder), folder)
    run_folder.clear_work(folder)
    assert contents(folder) == (before if name == "work" else {k: v for k, v in before.items() if "work" not in k})


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize("step", range(20))
def test_a_kill_leaves_all_of_the_old_run_or_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int, killed: bool
) -> None:
    """At every step. After an error the folder is repaired at once, after a kill by the next start."""
    before = contents(folder)
    steps = iter(range(step))

    def fail_at_step(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(steps, None) is None:
                raise Killed
            return function(*args, **kwargs)

        return call

    repaired = repair
    with monkeypatch.context() as patched:
        patched.setattr(run_folder.os, "rename", fail_at_step(os.rename))
        patched.setattr(run_folder, "write_aside", fail_at_step(files.write_aside))
        patched.setattr(run_folder.shutil, "rmtree", fail_at_step(run_folder.shutil.rmtree))
        if killed:
            patched.setattr(run_folder, "repair", lambda folder: None)
        try:
            begin(config(folder), folder)
        except Killed:
            assert (folder / "config.yaml").exists(), "or it would be taken for a foreign folder"
    repaired(folder)
    now = contents(folder)
    assert now in (before, {"config.yaml": "old config.yaml"}, {"config.yaml": config(folder).to_yaml()})
    begin(config(folder), folder)
    assert contents(folder) == {"config.yaml": config(folder).to_yaml()}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NotImplementedError("flock"), "its file system has no locks"),
        (PermissionError(13, "Permission denied"), r"cannot be written to \(Permission denied\)"),
        (IsADirectoryError(21, "Is a directory"), r"cannot be written to \(Is a directory\)"),
    ],
)
def test_a_folder_that_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def acquire(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(ConfigError, match=message), run_folder.lock_folder(tmp_path, resumes=True):
        pass


def test_what_is_in_the_lock_file_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(b"\xff damaged")
    with run_folder.lock_folder(tmp_path, resumes=True):
        pass
