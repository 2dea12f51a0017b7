"""The same command resumes a killed run, which ends like an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.forks import Forks
from support.runs import model_folder

RUNS = Path(__file__).resolve().parents[1] / "support" / "runs.py"
Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def start(forks: Forks) -> Start:
    """`start(base, phase, output)` runs the pipeline and kills it in that phase."""

    def run(base: Path, phase: str, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return forks.run(RUNS, str(base), str(output), *more, folder=base, kill_at=phase)

    return run


@pytest.fixture(scope="module")
def base(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    model_folder(folder / "model")
    done = start(folder, "never", folder / "uninterrupted")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("phase", ["search", "recovery", "export"])
def test_a_killed_run_ends_like_an_uninterrupted_one(start: Start, base: Path, phase: str) -> None:
    output = base / phase
    killed = start(base, phase, output)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (output / "run" / "summary.json").exists()
    assert not (output / "run" / "model").exists(), "a half-written export under its final name"
    resumed = start(base, "never", output)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming in" in resumed.stderr
    folders = output / "run", base / "uninterrupted" / "run"
    plans = [json.loads((folder / "plan.json").read_text()) for folder in folders]
    assert plans[0]["operations"] == plans[1]["operations"]
    assert plans[0]["search"]["layer_search"]["js"] == plans[1]["search"]["layer_search"]["js"]
    stages = [json.loads((folder / "summary.json").read_text())["stages"] for folder in folders]
    assert stages[0]["recovered"]["loss"] == stages[1]["recovered"]["loss"]
    assert stages[0]["recovered"]["kl_to_original"] == stages[1]["recovered"]["kl_to_original"]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    if phase == "recovery":
        assert "resuming from" in resumed.stderr


def test_a_run_killed_in_its_second_recovery_stage_resumes_there(start: Start, base: Path) -> None:
    """Texts, then instructions with adapters, then the experts of the merged model: bit for bit as if uninterrupted."""
    uninterrupted, output = base / "staged-uninterrupted", base / "staged-killed"
    done = start(base, "never", uninterrupted, "staged")
    assert done.returncode == 0, done.stderr
    killed = start(base, "recovery", output, "staged")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoints = sorted(
        str(path.relative_to(output / "run")) for path in (output / "run" / "checkpoints").glob("*/*.ckpt")
    )
    assert checkpoints == [
        "checkpoints/0-first/final.ckpt",
        "checkpoints/0-first/step=2.ckpt",
        "checkpoints/1-sft/step=2.ckpt",
    ]
    resumed = start(base, "never", output, "staged")
    assert resumed.returncode == 0, resumed.stderr
    assert "first: already trained, in" in resumed.stderr and "sft: resuming from" in resumed.stderr
    summary, expected = (
        json.loads((folder / "run" / "summary.json").read_text()) for folder in (output, uninterrupted)
    )
    assert summary["stages"]["recovered"]["loss"] == expected["stages"]["recovered"]["loss"]
    weights = [(folder / "run" / "model" / "model.safetensors").read_bytes() for folder in (output, uninterrupted)]
    assert weights[0] == weights[1]
    assert [stage["name"] for stage in summary["recovery_stages"]] == ["first", "sft", "last"]
    assert [stage.get("left_out") for stage in summary["recovery_stages"]] == [None, 1, 1]
    assert all(stage["seconds"] > 0 for stage in summary["recovery_stages"])
    last = summary["recovery_stages"][2]
    assert last["steps"] == -(-last["windows"] // 8) and last["windows"] < last["examples"] == 20
    assert summary["environment"]["data"].keys() >= {"train", "sft/train", "last/train"}
