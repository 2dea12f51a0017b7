"""How commands end: exit codes and messages of refusals, errors, defects, signals and sweeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.forks import Forks
from support.refusals import assert_refused
from support.runs import model_folder, text_files

from recondense.errors import UserError

Command = Callable[..., tuple[int, str]]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["method=cdmoee"], ["recondense: method=cdmoee: there is no such method. Did you mean cdmoe?"]),
        pytest.param(
            ["-m", "method.num_experts=1,99", "recovery=none", "data=texts", "data.calibration.path=nowhere.txt"],
            ["2 problems", "num_experts=99", "nowhere.txt"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_refused_process(root: Path, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(root / "train.py"), *arguments],
        cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert_refused(done.returncode, done.stderr, parts)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == [], "a refused command writes nothing"


def _raising(error: BaseException) -> Callable[..., None]:
    def run(*args: object, **kwargs: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (ValueError("layer 3: a hidden state is NaN"), None, "layer 3"),
        (UserError("layer 3: a hidden state is NaN"), 2, "recondense: layer 3"),
        (OSError(28, "No space left on device"), 2, "recondense: No space left on device. The same command goes on"),
        (PermissionError(13, "Permission denied", "a/b"), 2, "recondense: a/b: Permission denied. The same command"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), 2, "recondense: a -> b: Invalid cross-device link."),
        (ConnectionError("the hub is away"), 2, "recondense: the hub is away"),
        (KeyboardInterrupt(), 130, "The same command resumes"),
        (SystemExit(143), 143, "stopped by SIGTERM. The same command resumes"),
    ],
)
def test_errors_of_a_run(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int | None, part: str
) -> None:
    """Errors for users become messages; any other ValueError is a defect and keeps its traceback."""
    from recondense.run import pipeline

    monkeypatch.setattr(pipeline, "run", _raising(error))
    exit_code, err = command("recovery=none")
    assert exit_code == (1 if code is None else code)
    assert err.count(part) == 1 or code is None, err
    assert part in err
    assert ("Traceback" in err or "Error executing job" in err) == (code is None)


@pytest.mark.parametrize("expression", ["max([])", "int('x')", "[].index(1)", "list(zip([1], [], strict=True))"])
def test_a_defect_keeps_its_traceback(command: Command, monkeypatch: pytest.MonkeyPatch, expression: str) -> None:
    """The last frame of a ValueError from a builtin is in our code, but its text is no message for users."""
    from recondense.run import pipeline

    code = compile(expression, pipeline.__file__, "eval")
    monkeypatch.setattr(pipeline, "run", lambda *args, **kwargs: eval(code))
    exit_code, err = command("recovery=none")
    assert exit_code == 1
    assert "recondense: " not in err
    assert "Error executing job" in err


def test_user_errors_are_messages(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from recondense.config.types import parse_bytes
    from recondense.run import pipeline

    monkeypatch.setattr(pipeline, "run", lambda *args, **kwargs: parse_bytes("lots"))
    code, err = command("recovery=none")
    assert_refused(code, err, ["recondense: 'lots' is not a number of bytes"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run of seconds, with so short a calibration text that some experts are never selected."""
    folder = tmp_path_factory.mktemp("small")
    texts = text_files(folder / "texts")
    return [
        f"model.path={model_folder(folder / 'model')}", "model.device=cpu", "data=texts", "data.sequence_length=32",
        *(f"data.{split}.path={path}" for split, path in texts.items() if split != "train"),
        "data.calibration.num_samples=1", "data.calibration.max_length=1", "method.coefficient_max_length=1",
        "recovery=none", "evaluation.tasks=null",
        "evaluation.heldout=null", "evaluation.perplexity_windows=4", "callbacks.profile.enabled=false",
        "export.enabled=false", "logger.wandb.mode=disabled",
    ]  # fmt: skip


def _process(root: Path, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(root / "train.py"), *arguments, f"output_dir={folder}/out"],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_sweep_continues_after_a_user_error(forks: Forks, root: Path, tmp_path: Path, small: list[str]) -> None:
    words = ("-m", "method.num_experts=1,6,2", "method.num_layers=1", *small, f"output_dir={tmp_path}/out")
    done = forks.run(root / "train.py", *words, folder=tmp_path)
    out, err = done.stdout, done.stderr
    assert_refused(
        done.returncode, err, ["job 1 of the sweep failed: layer ", "recondense: method.num_experts=6: layer "]
    )
    [table] = (tmp_path / "out").glob("default/sweeps/*/comparison.json")
    rows = json.loads(table.read_text())
    assert [row["settings"] for row in rows] == [{"method.num_experts": number} for number in "162"]
    assert [row["status"].partition(":")[0] for row in rows] == ["done", "failed", "done"]
    assert "the calibration set selects only" in rows[1]["status"]
    assert rows[2]["compressed_perplexity"] > 0
    assert "comparison" in out and "DeepSpeed" not in out and "accelerator" not in out + err


def test_sigterm_outside_a_fit(root: Path, tmp_path: Path, small: list[str]) -> None:
    """In a fit callbacks/graceful_stop.py handles the signal. Here nothing trains: the profile would take minutes."""
    profile = ["callbacks.profile.enabled=true", "callbacks.profile.repetitions=10000", "method.num_experts=1"]
    with _process(root, tmp_path, *small, *profile) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not list(tmp_path.glob("out/default/*/.lock")):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    message = "recondense: stopped by SIGTERM. The same command resumes where this run stopped."
    assert err.count("SIGTERM") == 1 and message in err.splitlines(), err
    assert "Traceback" not in err


def test_a_valid_command_runs(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It leaves no folder of Hydra's."""
    from recondense.run import pipeline

    runs = []
    monkeypatch.setattr(pipeline, "run", lambda config, steps, *rest: runs.append((config, steps)) or 1.0)
    monkeypatch.chdir(tmp_path)
    code, err = command("recovery=none", "method.num_layers=2")
    assert (code, err) == (0, "")
    [(config, steps)] = runs
    assert config.method["num_layers"] == 2 and steps[0].num_layers == 2
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_runs_every_job(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A sweep has one folder, named by its command; its jobs have no folders of Hydra's."""
    from recondense.run import pipeline

    configs = []
    monkeypatch.setattr(pipeline, "run", lambda config, steps, *rest: configs.append(config) or 1.0)
    monkeypatch.chdir(tmp_path)
    code, err = command("-m", "recovery=none", "method.num_layers=2,4", f"output_dir={tmp_path}/here")
    assert code == 0, err
    assert [config.method["num_layers"] for config in configs] == [2, 4]
    assert len({config.run_folder() for config in configs}) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    [sweep] = (tmp_path / "here" / "default" / "sweeps").iterdir()
    assert not [path for path in sweep.iterdir() if path.is_dir()]
