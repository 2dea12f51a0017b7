"""Fixtures of all tests: nothing is downloaded, nothing prompts, and no file stays behind in the repository."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.forks import Forks
from support.log_handlers import restore_loggers
from support.read_once import freeze_imported_objects, read_configs_once

import recondense.run.default_budget  # noqa: F401 (registers ${budget:...}, which configs contain)

# Before any library reads them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
)

# Shells start background jobs with SIGINT ignored, and processes inherit that; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
CACHES = {"__pycache__", ".git", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".venv"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        for item in gpu if not torch.cuda.is_available() else ():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    read_configs_once()
    freeze_imported_objects()


@pytest.fixture(scope="session", autouse=True)
def no_stray_files() -> Iterator[None]:
    """Fail if a test leaves files at the top of the repository, in outputs/, or beside the configs or tests."""

    def listing() -> set[Path]:
        folders = (ROOT, ROOT / "outputs", ROOT / "conf", ROOT / "tests")
        return {path for folder in folders for path in folder.glob("*") if path.name not in CACHES}

    before = listing()
    yield
    stray = sorted(str(path.relative_to(ROOT)) for path in listing() - before)
    assert not stray, f"tests left files in the repository: {', '.join(stray)}"


@pytest.fixture(scope="module", autouse=True)
def restore_loggers_after_module() -> Iterator[None]:
    with restore_loggers():
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs commands in processes that have imported everything already."""
    runner = Forks()
    yield runner
    runner.close()


@pytest.fixture
def as_one_command() -> Iterator[None]:
    """Restores what a command changes, for tests that run one in this process."""
    from support.runs import one_command

    with one_command():
        yield


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """Runs train.py in this process: `command("method=none", ...)` returns the exit code and stderr.

    Outputs go to a temporary folder.
    """
    import train

    def run(*arguments: str) -> tuple[int, str]:
        output = (
            () if any(argument.startswith("output_dir=") for argument in arguments) else (f"output_dir={tmp_path}/out",)
        )
        monkeypatch.setattr("sys.argv", ["train.py", *arguments, *output])
        code = 0
        try:
            train.main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        return code, capsys.readouterr().err

    return run
