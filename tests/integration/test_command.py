"""The command as users see it: what it imports before it refuses, how long that takes, and the wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from recondense.run.help_page import GROUPS

HEAVY = {
    *("torch", "transformers", "lightning", "datasets", "lm_eval", "peft", "deepspeed"),
    *("accelerate", "matplotlib", "wandb", "scipy", "huggingface_hub"),
}
CHILD = """
import json, resource, sys
from recondense.run.command_line import main
code = 0
try:
    main()
except SystemExit as error:
    code = error.code
used = resource.getrusage(resource.RUSAGE_SELF)
packages = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"code": code, "seconds": used.ru_utime + used.ru_stime, "packages": packages}))
"""


def run(root: Path, folder: Path, *arguments: str) -> tuple[dict[str, Any], str, str]:
    """Run a command in a process of its own.

    Returns:
        its exit code, CPU seconds and imported packages; its stdout; its stderr.
    """
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    out, _, report = done.stdout.rstrip().rpartition("\n")
    return json.loads(report), out, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=foo"], "method=foo: there is no such method. Choices: aimer, block_drop, cdmoe,"),
        (["recovery.stepz=3"], "Did you mean recovery.steps?"),
        (["recovery.steps=many", "seed=-1"], "seed=-1: must be in [0, 4294967295]."),
        (["model.path=/nowhere/at/all", "method=cdmoee"], "there is no such folder"),
        (["data=texts", "data.calibration.path=/nowhere.jsonl", "seed=x"], "/nowhere.jsonl: there is no such file"),
        (["-m", "seed=0,x,-1"], "seed=-1: must be in [0, 4294967295]."),
    ],
)
def test_a_wrong_name_or_type_is_refused_without_torch(
    root: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    """It takes a second and a half on an idle machine; here other processes may use the same cores."""
    report, _, err = run(root, tmp_path, *arguments)
    assert report["code"] == 2 and message in err
    assert HEAVY & set(report["packages"]) == set()
    assert report["seconds"] < 4.5
    assert list(tmp_path.iterdir()) == []


def test_help_is_a_page_for_people(root: Path, tmp_path: Path) -> None:
    report, out, err = run(root, tmp_path, "--help")
    assert report["code"] == 0 and err == ""
    assert HEAVY & set(report["packages"]) == set()
    assert report["seconds"] < 4.5
    lines = out.splitlines()
    assert sum(line.startswith("  recondense ") for line in lines) == 5
    assert "docs/configuration.md" in lines[-1] and max(map(len, lines)) <= 120
    groups = {path.name for path in (root / "conf").iterdir() if path.is_dir()} - {"hydra"}
    assert groups == set(GROUPS)
    for path in (root / "conf").rglob("[!_]*.yaml"):
        group, *name = path.relative_to(root / "conf").with_suffix("").parts
        if group in groups:
            [line] = [line for line in lines if line.startswith(f"  {'/'.join(name)} ")][:1]
            assert len(line.split()) > 2, f"{path} has no comment at its head"


def test_help_says_how_it_was_called(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, root / "train.py", "--help"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    assert done.stdout.count("\n  python train.py ") == 5 and "\n  recondense " not in done.stdout


@pytest.mark.parametrize("words", ["--help", "plan_only=true model=mixtral", "seed=x"])
def test_a_reader_that_leaves_ends_nothing(root: Path, tmp_path: Path, words: str) -> None:
    """As `head` does: no traceback, the exit code of the command, and all that it writes is written."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as closed:
        done = subprocess.run(
            [sys.executable, root / "train.py", *words.split()],
            cwd=tmp_path, env=environment, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=200, check=False,
        )  # fmt: skip
    assert done.returncode == (2 if words == "seed=x" else 0) and len(done.stderr.splitlines()) == (words == "seed=x")
    assert len(list(tmp_path.glob("outputs/default/*-plan_only/summary.json"))) == words.startswith("plan_only")


def test_sizes_need_neither_lightning_nor_pictures(root: Path, tmp_path: Path) -> None:
    """It takes five seconds on an idle machine."""
    report, out, err = run(root, tmp_path, "plan_only=true", "model=mixtral")
    assert report["code"] == 0 and "46,702,792,704" in out, err
    assert (HEAVY - {"torch", "transformers", "accelerate", "scipy", "huggingface_hub"}) & set(
        report["packages"]
    ) == set()
    assert report["seconds"] < 20


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel of a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "LICENSE", "src", "callbacks", "conf"):
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, folder / name, **({"symlinks": True} if (root / name).is_dir() else {}))
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, timeout=200, check=True)
    [path] = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_is_one_package(root: Path, wheel: Path) -> None:
    """It contains the configs and the callbacks of the repository."""
    assert sorted(path.name.partition("-")[0] for path in wheel.iterdir()) == ["recondense", "recondense"]
    for name in ("conf", "callbacks"):
        names = {path.relative_to(root / name) for path in (root / name).rglob("*") if path.is_file()}
        packaged = {
            path.relative_to(wheel / "recondense" / name) for path in (wheel / "recondense" / name).rglob("*.*")
        }
        assert packaged == {path for path in names if "__pycache__" not in path.parts}
    [entry_points] = wheel.glob("*.dist-info/entry_points.txt")
    assert "recondense = recondense.run.command_line:main" in entry_points.read_text()


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    start = "from recondense.run.command_line import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", start, "plan_only=true", "model=deepseek_moe"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [summary] = tmp_path.glob("outputs/default/*-plan_only/summary.json")
    assert json.loads(summary.read_text())["plan_only"]
