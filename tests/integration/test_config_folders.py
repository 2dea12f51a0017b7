"""A user's own configs, in folders given to Hydra: checked like those of conf/, and found by every process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.forks import Forks
from support.runs import ROOT

from recondense.config.schema import Config
from recondense.run import pipeline

Command = Callable[..., tuple[int, str]]
Runs = list[tuple[Config, list[str]]]

EXPERIMENT = "# @package _global_\ndefaults:\n  - override /recovery: none\nexperiment_name: mine\nseed: 7\n"
PRIMARY = f"defaults:\n  - train\n  - _self_\nhydra:\n  searchpath:\n    - file://{ROOT}/conf\nmetric: loss\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with experiments, and a primary config that extends the project's."""
    folder = tmp_path / "my configs"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text(EXPERIMENT)
    (folder / "experiment" / "yours.yaml").write_text(EXPERIMENT.replace("mine", "yours").replace("7", "8"))
    (folder / "own.yaml").write_text(PRIMARY)
    return folder


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The runs that a command starts: their configs, and the commands of their other processes."""
    runs: Runs = []

    def note(config: Config, steps: Any, callbacks: Any, process_command: list[str], stages: Any) -> float:
        runs.append((config, process_command))
        return 1.0

    monkeypatch.setattr(pipeline, "run", note)
    return runs


WAYS: dict[str, Callable[[Path], list[str]]] = {
    "--config-dir": lambda folder: [f"--config-dir={folder}", "experiment=mine"],
    "a relative --config-dir": lambda folder: ["-cd", folder.name, "experiment=mine"],
    "hydra.searchpath": lambda folder: [f'hydra.searchpath=["file://{folder}"]', "experiment=mine"],
    "--config-path and its hydra.searchpath": lambda folder: [
        *(f"--config-path={folder}", "--config-name=own", "experiment=mine")
    ],
    "--config-name": lambda folder: [f"--config-dir={folder}", "--config-name=own", "experiment=mine"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_and_its_other_processes(
    command: Command, runs: Runs, folder: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.chdir(folder.parent)
    words = WAYS[way](folder)
    code, err = command(*words)
    assert code == 0, err
    [(config, process_command)] = runs
    assert (config.experiment_name, config.seed, config.recovery.name) == ("mine", 7, "none")
    assert process_command[1:4] == ["-P", "-m", "recondense.run.command_line"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["worker"])  # as a launcher's process, whose command line does not name the folder
    code, err = command(*process_command[4:])
    assert code == 0, err
    assert runs[1] == (config, process_command)


@pytest.mark.parametrize("way", ["a relative --config-dir", "hydra.searchpath"])
def test_a_sweep(command: Command, runs: Runs, folder: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.chdir(folder.parent)
    words = [word.replace("experiment=mine", "experiment=mine,yours") for word in WAYS[way](folder)]
    code, err = command("-m", *words)
    assert code == 0, err
    assert [(config.experiment_name, config.seed) for config, _ in runs] == [("mine", 7), ("yours", 8)]
    code, err = command(*runs[1][1][4:])
    assert code == 0, err
    (child, children_of_child), (config, children) = runs[2], runs[1]
    assert config.logger.wandb.group, "the runs of a sweep share a group; only their first processes log"
    same = replace(child, logger=config.logger), children_of_child
    assert same == (config, children), "the other processes of a run do not start a sweep"


def test_the_primary_config_is_used(command: Command, runs: Runs, folder: Path) -> None:
    code, err = command(f"--config-path={folder}", "--config-name=own", "recovery=none")
    assert code == 0, err
    assert runs[0][0].metric == "loss"


BAD: dict[str, tuple[list[str], list[str]]] = {
    "an experiment that is misspelt": (
        ["--config-dir={}", "experiment=mien"],
        ["experiment=mien: there is no such experiment", "Did you mean mine?"],
    ),
    "one of the search path": (
        ['hydra.searchpath=["file://{}"]', "experiment=mien"],
        ["experiment=mien: there is no such experiment", "Did you mean mine?"],
    ),
    "one of a primary config's search path": (
        ["--config-path={}", "--config-name=own", "recovery=nnoe"],
        ["recovery=nnoe: there is no such recovery", "Did you mean none?"],
    ),
    "a setting within": (["--config-dir={}", "experiment=bad"], ["seed=x: expected a whole number"]),
    "a setting beside it": (
        ["--config-dir={}", "experiment=mine", "method.num_expert=2"],
        ["method.num_expert: there is no such setting", "method.num_experts"],
    ),
    "one run of a sweep": (["-m", "--config-dir={}", "experiment=mine,bad"], ["seed=x: expected a whole number"]),
    "no YAML": (["--config-dir={}", "experiment=torn"], ["experiment=torn: ", "torn.yaml"]),
    "no such folder": (["--config-dir={}/nowhere"], ["--config-dir={}/nowhere: there is no such folder"]),
    "no such primary folder": (["--config-path={}/nowhere"], ["--config-path={}/nowhere: there is no such folder"]),
    "no such folder to search": (
        ['hydra.searchpath=["{}/nowhere"]'],
        ["hydra.searchpath={}/nowhere: there is no such folder"],
    ),
    "a search path that is no list": (["hydra.searchpath={}"], ["hydra.searchpath", "must be a list of strings"]),
    "no such primary config": (["--config-name=trian"], ["--config-name=trian: Cannot find primary config 'trian'"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_refused(command: Command, runs: Runs, folder: Path, tmp_path: Path, kind: str) -> None:
    folder = folder.rename(tmp_path / "configs")
    (folder / "experiment" / "bad.yaml").write_text(EXPERIMENT.replace("7", "x"))
    (folder / "experiment" / "torn.yaml").write_text(EXPERIMENT + "metric: [a\n")
    words, parts = BAD[kind]
    code, err = command(*(word.replace("{}", str(folder)) for word in words))
    assert code == 2 and "Traceback" not in err, err
    assert all(part.replace("{}", str(folder)) in err for part in parts), err
    assert len(err.splitlines()) == 1 and not runs


def test_a_relative_config_path_begins_beside_the_script(forks: Forks, tmp_path: Path) -> None:
    done = forks.run(
        ROOT / "train.py", "--config-path=conf", "experiment=plan_onyl", f"output_dir={tmp_path}", folder=tmp_path
    )
    assert done.returncode == 2 and "experiment=plan_onyl: there is no such experiment" in done.stderr, done.stderr
    done = forks.run(ROOT / "train.py", "--config-path=../conf", f"output_dir={tmp_path}", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"--config-path={ROOT.parent}/conf: there is no such folder" in done.stderr


def test_other_processes_of_a_plain_command(command: Command, runs: Runs) -> None:
    assert command("recovery=none", "seed=3")[0] == 0
    process_command: list[Any] = runs[0][1]
    assert process_command[4:7] == [f"--config-path={ROOT / 'conf'}", "--config-name=train", "recovery=none"]
