"""A run in an environment that other programs have left, with nobody to read its output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import ROOT, arguments, model_folder, text_files

LEFT_OVER = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # of a notebook
    "RANK": "1", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none", "NODE_RANK": "1",
    "SLURM_NTASKS": "4", "SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "job", "JSM_NAMESPACE_RANK": "1", "LSB_JOBID": "3",
    "LSB_DJOB_RANKFILE": "/nowhere", "OMPI_COMM_WORLD_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1",
    "COLUMNS": "0", "TERM": "dumb", "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "TQDM_DISABLE": "1",
    "HF_HOME": "/proc/nowhere", "HF_DATASETS_CACHE": "/proc/nowhere", "TMPDIR": "/nowhere", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


def test_a_run_goes_on(tmp_path: Path) -> None:
    """Its report goes to stderr, and its metrics are written, which Lightning leaves to the process of rank 0."""
    texts = text_files(tmp_path / "texts")
    words = arguments(model_folder(tmp_path / "model"), texts, tmp_path / "out", "run", "recovery=finetune")
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | LEFT_OVER
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, str(ROOT / "train.py"), *words, "export.enabled=false"],
        cwd=tmp_path, env=environment, capture_output=True, timeout=250,
    )  # fmt: skip
    err = done.stderr.decode()
    assert done.returncode == 0, err
    assert "results: " in err and "Traceback" not in err
    folder = tmp_path / "out" / "run"
    assert "recovered" in json.loads((folder / "summary.json").read_text())["stages"]
    assert list((folder / "logs").rglob("*.csv"))


@pytest.mark.parametrize("variable", ["1", "2"])
def test_a_python_without_assertions_is_refused(tmp_path: Path, variable: str) -> None:
    """Before it goes wrong in silence, or in the documentation of transformers; the help is there all the same."""
    environment = {**os.environ, "PYTHONOPTIMIZE": variable}
    train = [sys.executable, str(ROOT / "train.py")]
    notebook = "import recondense, sys\ntry: recondense.load\nexcept ValueError as error: sys.exit(str(error))"
    for words in ([*train, "plan_only=true"], [sys.executable, "-c", notebook]):
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr
        assert f"PYTHONOPTIMIZE={variable}, which removes checks that recondense needs; run without it" in done.stderr
    done = subprocess.run([*train, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "method" in done.stdout
