"""The commit that summary.json records."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from recondense.report import summary


@pytest.fixture
def commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The only commit of a repository in `tmp_path`."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for command in ("init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m a"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("package", "is_checkout"),
    [
        ("src/recondense/report", True),
        (".venv/lib/python3.11/site-packages/recondense/report", False),
        ("vendor/recondense/src/recondense/report", False),
        ("recondense/report", False),
    ],
)
def test_the_commit_is_that_of_recondenses_checkout(
    tmp_path: Path, commit: str, monkeypatch: pytest.MonkeyPatch, package: str, is_checkout: bool
) -> None:
    (tmp_path / package).mkdir(parents=True)
    monkeypatch.setattr(summary, "__file__", str(tmp_path / package / "summary.py"))
    assert summary._git_commit() == (commit if is_checkout else None)


def test_a_hook_of_another_repository_changes_nothing(
    tmp_path: Path, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "src" / "recondense" / "report").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", "other"], cwd=tmp_path, check=True)
    monkeypatch.setattr(summary, "__file__", str(tmp_path / "src" / "recondense" / "report" / "summary.py"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    assert summary._git_commit() == commit


def test_without_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recondense" / "report").mkdir(parents=True)
    monkeypatch.setattr(summary, "__file__", str(tmp_path / "recondense" / "report" / "summary.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert summary._git_commit() is None


def test_a_run_from_a_checkout_records_its_commit(root: Path) -> None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("the tests do not run from a checkout")
    assert summary._git_commit() == done.stdout.strip()
