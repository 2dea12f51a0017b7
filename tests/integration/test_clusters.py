"""Sweeps by joblib, submitit and Optuna, and the batch script of a recovery on several machines."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from support import read_once
from support.checks import config_messages
from support.forks import Forks
from support.runs import ROOT, arguments, model_folder, text_files

from recondense.config.schema import Config, read
from recondense.report import summary
from recondense.run import pipeline, sweeping

for package in sweeping.PLUGINS:
    pytest.importorskip(f"hydra_plugins.{package}")

Command = Callable[..., tuple[int, str]]
SCRIPT = ROOT / "conf" / "trainer" / "slurm.sbatch"
OPTUNA = ("-m", "hydra/sweeper=optuna", "recovery=none")

BAD: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "launcher of one run": (
        ("hydra/launcher=joblib", "recovery=none"),
        ["hydra-joblib-launcher is for sweeps", "one run", "Add -m"],
    ),
    "launcher on SLURM of one run": (("hydra/launcher=submitit", "recovery=none"), ["is for sweeps", "Add -m"]),
    "unknown launcher": (
        ("-m", "hydra/launcher=joblb", "seed=0", "recovery=none"),
        ["there is no such hydra/launcher", "Did you mean joblib?"],
    ),
    "unknown setting of a launcher": (
        ("-m", "hydra/launcher=submitit", "hydra.launcher.partitio=gpu", "seed=0", "recovery=none"),
        ["hydra.launcher.partitio"],
    ),
    "interval without Optuna": (
        ("-m", "method.memory_ratio=interval(0.6,0.9)", "recovery=none"),
        ["method.memory_ratio=interval(0.6,0.9)", "hydra/sweeper=optuna"],
    ),
    "the lower end of an interval": (
        ("experiment=pareto", "method=reap", "method.memory_ratio=interval(0.01,0.9)"),
        ["method.memory_ratio=0.01", "still has"],
    ),
    "metrics without directions": (
        (*OPTUNA, "seed=0,1", "metric=[memory,perplexity]"),
        ["metric=[memory, perplexity]: 2 metrics, but hydra.sweeper.direction=[minimize]"],
    ),
    "no direction": (
        (*OPTUNA, "seed=0,1", "hydra.sweeper.direction=down"),
        ["hydra.sweeper.direction=down", "minimize or maximize"],
    ),
    "unknown metric": (("metric=perplexty", "recovery=none"), ["metric=perplexty", "Did you mean perplexity?"]),
    "unknown metric of two": (
        ("metric=[memory,perplexty]", "recovery=none"),
        ["metric[1]=perplexty", "Did you mean perplexity?"],
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_sweeps(command: Command, kind: str) -> None:
    words, parts = BAD[kind]
    code, err = command(*words)
    assert code == 2 and "Traceback" not in err, err
    assert all(part in err for part in parts), err


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("hydra/launcher=joblib", ("-m", "hydra/launcher=joblib", "seed=0,1")),
        ("hydra/launcher=submitit", ("-m", "hydra/launcher=submitit", "seed=0,1")),
        ("hydra/sweeper=optuna", ("experiment=pareto",)),
    ],
)
def test_a_package_that_is_not_installed(
    command: Command, monkeypatch: pytest.MonkeyPatch, choice: str, words: tuple[str, ...]
) -> None:
    group, _, name = choice.partition("=")
    monkeypatch.setattr(read_once, "_cache", {})
    monkeypatch.setattr(sweeping, "_installed", lambda module: False)
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"][group.partition("/")[2]], f"{name}.yaml", raising=False)
    code, err = command(*words)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert f"{choice}: hydra-{name}-" in err and "pip install 'recondense[cluster]'" in err


def test_a_jobs_folder_is_that_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job composes its config in a process with another command line, and still writes to the sweep's folder."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        monkeypatch.setattr("sys.argv", ["train.py", "-m", "seed=0,1"])
        sweep = compose("train", return_hydra_config=True)
        OmegaConf.set_readonly(sweep.hydra, False)
        sweep.hydra.job.config_name = "train"
        folder = sweep.hydra.sweep.dir  # as the callback reads it when the sweep starts
        monkeypatch.setattr("sys.argv", ["worker"])
        job = GlobalHydra.instance().config_loader().load_sweep_config(sweep, ["seed=1"])
        assert job.hydra.sweep.dir == folder
        assert compose("train", return_hydra_config=True).hydra.sweep.dir != folder


def test_parallel_runs_have_no_progress_bars(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With one job at a time, joblib's launcher runs it in this process."""
    configs: list[Config] = []
    monkeypatch.setattr(pipeline, "run", lambda config, steps, *rest: configs.append(config) or 1.0)
    words = ("-m", "recovery=none", "method.num_layers=2,4", f"output_dir={tmp_path}/out")
    assert command(*words) == (0, "")
    code, err = command(*words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=1")
    assert code == 0, err
    assert [(config.method["num_layers"], config.trainer.progress_bar) for config in configs] == [
        *((2, True), (4, True), (2, False), (4, False))
    ]
    assert configs[0].run_folder() == configs[2].run_folder()


def test_several_metrics() -> None:
    figures = {"ratios": {"memory": 0.5}, "stages": {"compressed": {"perplexity": 9}, "recovered": {"perplexity": 7.0}}}
    assert summary.metric(figures, ("memory", "perplexity", "gap_closed")) == (0.5, 7.0, None)
    assert summary.metric(figures, "perplexity") == 7.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Optuna 2 calls SQLAlchemy 2 in a deprecated way
def test_optuna_gets_both_metrics(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It writes the front of its trials. A failing trial stops no other, but sets the exit code. Again, the same."""
    errors = {2: OSError(28, "No space left on device"), 1: RuntimeError("boom")}  # a user error, and a defect of ours
    runs: list[tuple[str, float, float]] = []

    def run(config: Config, *rest: Any) -> tuple[float, float]:
        method = config.method
        ratio, name = method["memory_ratio"], str(method["name"])
        if len(runs) == 3:
            runs.append((name, 9.0, 9.0))
            raise errors[expected]
        # One method is better everywhere, and the loss no longer grows below a ratio of 0.6.
        loss = (2.0 if name == "reap" else 1.0) / max(ratio, 0.6)
        runs.append((name, ratio, loss))
        return ratio, loss

    monkeypatch.setattr(pipeline, "run", run)
    words = ("experiment=pareto", "method=cdmoe,reap", "hydra.sweeper.n_trials=6", f"output_dir={tmp_path}/out")
    expected = 2
    code, err = command(*words)
    assert code == expected and "No space left on device" in err.splitlines()[-1], err
    first, trials = list(runs), [trial for trial in runs if trial[1] < 9]
    assert len(runs) == 6 and {name for name, _, _ in runs} == {"cdmoe", "reap"}
    assert all(0.509 <= ratio <= 0.9 for _, ratio, _ in trials)
    [folder] = (tmp_path / "out" / "pareto" / "sweeps").iterdir()
    solutions = yaml.safe_load((folder / "optimization_results.yaml").read_text())["solutions"]
    front = [
        (ratio, loss)
        for _, ratio, loss in trials
        if not any(r <= ratio and x <= loss and (r, x) != (ratio, loss) for _, r, x in trials)
    ]
    assert sorted(tuple(solution["values"]) for solution in solutions) == sorted(front)
    assert len(json.loads((folder / "comparison.json").read_text())) == 6
    runs.clear()
    expected = 1
    assert command(*words)[0] == expected
    assert runs == first


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder, and settings of a run in a second without training."""
    base = tmp_path_factory.mktemp("clusters")
    words = arguments(model_folder(base / "model"), text_files(base / "texts"), base / "out", "x")
    off = ("callbacks.profile.enabled=false", "recovery=none", "export.enabled=false")
    return base, [*off, *(word for word in words if not word.startswith(("run_dir", "recovery.", "trainer.")))]


def comparison(base: Path, done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    assert "comparison.csv, comparison.json and the picture are in" in done.stdout.splitlines()[-1]
    path = max(base.glob("out/*/sweeps/*/comparison.json"), key=lambda path: path.stat().st_mtime)
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    assert all(row["status"] == "done" for row in rows)
    return rows


@pytest.mark.slow  # each of their processes imports everything
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_two_runs_at_once_in_processes_of_their_own(forks: Forks, real: tuple[Path, list[str]], launcher: str) -> None:
    base, words = real
    more = ("hydra.launcher.n_jobs=2",) if launcher == "joblib" else ()
    sweep = ("-m", f"hydra/launcher={launcher}", *more, "method.num_experts=2", "method.num_layers=1,2")
    done = forks.run(ROOT / "train.py", *sweep, *words, f"experiment_name={launcher}", folder=base)
    rows = comparison(base, done)
    assert [row["settings"] for row in rows] == [{"method.num_layers": "1"}, {"method.num_layers": "2"}]
    assert rows[0]["memory_ratio"] > rows[1]["memory_ratio"]
    assert "UserWarning" not in done.stderr


@pytest.mark.slow
def test_optuna_on_a_real_model(forks: Forks, real: tuple[Path, list[str]]) -> None:
    base, words = real
    several = ("metric=[memory,perplexity]", "hydra.sweeper.direction=[minimize,minimize]")
    sampler = ("hydra.sweeper.sampler.seed=0", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1")
    budget = ("method=reap,frequency", "method.memory_ratio=interval(0.8,0.95)")
    done = forks.run(
        ROOT / "train.py", "-m", "hydra/sweeper=optuna", *several, *sampler, *budget, *words, "experiment_name=optuna",
        folder=base,
    )  # fmt: skip
    rows = comparison(base, done)
    assert len(rows) == 4
    [path] = base.glob("out/optuna/sweeps/*/optimization_results.yaml")
    measured = {(row["memory_ratio"], row["compressed_perplexity"]) for row in rows}
    solutions = yaml.safe_load(path.read_text())["solutions"]
    assert {tuple(solution["values"]) for solution in solutions} <= measured


def sbatch_words(folder: Path, *more: str, code: int = 0) -> tuple[list[str], str, int]:
    """What the script passes to srun and then to scontrol, and its exit code. Scripts stand in for SLURM's commands."""
    commands = {
        "srun": f'printf "%s\\n" "$@" > {folder}/srun; exit {code}',
        "scontrol": f'echo "$@" > {folder}/scontrol',
    }
    (folder / "bin").mkdir()
    for name, body in commands.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    job = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_ID": "17"}
    done = subprocess.run(
        ["bash", str(SCRIPT), *more], cwd=folder, capture_output=True, text=True, timeout=30,
        env={**job, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stderr == ""
    after = folder / "scontrol"
    return (folder / "srun").read_text().splitlines(), after.read_text() if after.exists() else "", done.returncode


def test_the_batch_script_is_a_valid_command(tmp_path: Path) -> None:
    words, after, code = sbatch_words(tmp_path, "seed=7")
    assert (after, code) == ("", 0)
    start = words.index("python")
    assert words[start + 1] == "train.py" and all(word.startswith("--") for word in words[:start])
    overrides = words[start + 2 :]
    assert {"trainer.num_nodes=2", "trainer.devices=8", "seed=7"} <= set(overrides)
    trainer = next(word.partition("=")[2] for word in overrides if word.startswith("trainer="))
    if not (ROOT / "conf" / "trainer" / f"{trainer}.yaml").exists():  # then it has no settings either
        overrides = [word for word in overrides if not word.startswith("trainer")]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        values: Any = OmegaConf.to_container(compose("train", overrides), resolve=True)
    config, problems = read(values)
    assert problems == [] and config_messages(config) == []
    assert (config.model.name, config.recovery.objective, config.seed) == ("qwen_moe", "distill", 7)


def test_the_batch_script_requeues_after_a_stop(tmp_path: Path) -> None:
    """train.py exits with 143 after a SIGTERM, once its checkpoint is written. Other failures are not requeued."""
    (tmp_path / "stopped").mkdir()
    (tmp_path / "failed").mkdir()
    assert sbatch_words(tmp_path / "stopped", code=143)[1:] == ("requeue 17\n", 143)
    assert sbatch_words(tmp_path / "failed", code=2)[1:] == ("", 2)


def test_the_batch_script_requests_a_process_for_each_gpu() -> None:
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in SCRIPT.read_text().splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
