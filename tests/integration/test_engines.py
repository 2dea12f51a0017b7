"""Recovery by engines on two processes gives the losses, checkpoints and weights of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import engine_pipelines, engine_runs
from support.forks import Forks
from support.runs import ROOT, arguments, model_folder, one_command, paper_tasks, text_files
from torch import Tensor

from recondense.recovery.module import RecoveryModule

ENGINES = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")
ALL = (*ENGINES, *engine_runs.SHORT_ALONE)
OF_COMPLETE_RUNS = ("fsdp2", "deepspeed_zero2")
SUPPORT = ROOT / "tests" / "support"
# Lightning warns about every fit that resumes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # of a checkpoint that was copied
]


class Runs:
    """The same training by one process, and by each engine on two processes, which are killed once and resumed."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder = folder
        self.tasks = paper_tasks(folder / "tasks")
        self.module, self.watcher = engine_runs.train(
            "auto", folder / "one", tasks=engine_runs.TASKS, task_folder=self.tasks
        )
        self.process = forks.run(SUPPORT / "engine_runs.py", str(folder), str(self.tasks), *ALL, folder=folder)

    def results(self, engine: str) -> list[dict[str, Any]]:
        assert self.process.returncode == 0, self.process.stderr[-3000:]
        return [json.loads((self.folder / f"{engine}-{rank}.json").read_text()) for rank in range(2)]

    def assert_same_weights(self, weights: dict[str, Tensor]) -> None:
        for name, value in self.module.model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=5e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Runs:
    return Runs(tmp_path_factory.mktemp("engines"), forks)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(runs: Runs, engine: str) -> None:
    """Killed at step 6 and resumed from step 4, with a condensed layer, and with low-rank experts without tokens."""
    first, second = runs.results(engine)
    losses = {int(step): loss for step, loss in first["losses"].items()}
    assert losses == pytest.approx(runs.watcher.losses, abs=1e-4) and len(losses) == engine_runs.STEPS
    assert max(losses.values()) > 1.5 * min(losses.values()), "a flat curve would show nothing"
    assert first["losses"] == second["losses"]
    assert first["repeated_differences"] == pytest.approx([0, 0], abs=1e-6)
    assert min(first["idle"], second["idle"]) > 0, "each process had experts without tokens"
    for step, expected in runs.watcher.validation.items():  # three windows, which two processes share unevenly
        assert first["validation"][str(step)] == pytest.approx(expected, abs=1e-5)
    runs.assert_same_weights(torch.load(runs.folder / engine / "weights-0.pt"))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("short")
    return folder, {name: engine_runs.short(name, "auto", folder / name) for name in engine_runs.SHORT}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", engine_runs.SHORT)
def test_other_plans_types_and_losses(
    runs: Runs, short: tuple[Path, dict[str, list[float]]], engine: str, name: str
) -> None:
    losses = short[1]
    rounding = 3e-2 if "bf16" in name else 1e-4
    for results in runs.results(engine):
        assert results["short"][name] == pytest.approx(losses[name], rel=rounding) and len(losses[name]) >= 2


@pytest.mark.parametrize("engine", ALL)
@pytest.mark.parametrize("name", engine_runs.MOMENTS)
def test_gradients_have_the_size_of_one_process(
    runs: Runs, short: tuple[Path, dict[str, list[float]]], engine: str, name: str
) -> None:
    for results in runs.results(engine):
        assert results["short"][name] == pytest.approx(short[1][name], rel=1e-4)
    moments, expected = engine_runs.moments(runs.folder / engine / name), engine_runs.moments(short[0] / name)
    for moment, norms in expected.items():
        assert moments[moment] == pytest.approx(norms, rel=1e-3)


def test_the_clipped_case_is_clipped(short: tuple[Path, dict[str, list[float]]]) -> None:
    clipped, free = (engine_runs.moments(short[0] / name)["exp_avg"] for name in ("clipped", "accumulated"))
    assert max(clipped) < 1e-4 < 0.1 * max(free)


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_weights_cost_nothing(runs: Runs, engine: str) -> None:
    results = runs.results(engine)
    moments = 2 * sum(value.numel() for value in engine_runs.module_of().parameters() if value.requires_grad)
    states = [result["state_elements"] for result in results]
    assert [result["frozen_gradients"] for result in results] == [0, 0]
    assert states == [moments, moments] if engine == "ddp" else moments <= sum(states) <= 1.01 * moments
    sharded = engine in ("fsdp2", "deepspeed_zero3")
    assert [result["empty"] for result in results] == [False, sharded], "a full copy on the first process, if sharded"


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_resumes_from_two(runs: Runs, engine: str, tmp_path: Path) -> None:
    runs.results(engine)  # fails if the processes did
    name = f"step={2 * engine_runs.CHECKPOINT_EVERY}.ckpt"
    shutil.copy(runs.folder / engine / name, tmp_path)
    checkpoint = torch.load(tmp_path / name, weights_only=True)
    names = {name for name, value in engine_runs.module_of().named_parameters() if value.requires_grad}
    assert set(checkpoint["state_dict"]) == names, "a checkpoint has the parameters that train"
    module, watcher = engine_runs.train("auto", tmp_path)
    assert sorted(watcher.losses) == [9, 10]
    runs.assert_same_weights(module.model.state_dict())


@pytest.mark.parametrize("engine", ALL)
def test_two_processes_resume_from_one(runs: Runs, engine: str) -> None:
    expected = {step: runs.watcher.losses[step] for step in (9, 10)}
    for results in runs.results(engine):
        assert {int(step): loss for step, loss in results["resumed"].items()} == pytest.approx(expected, abs=1e-4)
    runs.assert_same_weights(torch.load(runs.folder / f"{engine}-resumed" / "weights.pt"))


@pytest.mark.parametrize("engine", ENGINES)
def test_lm_eval_while_training(runs: Runs, engine: str) -> None:
    expected = json.loads(json.dumps(runs.module.task_results))
    assert set(expected) == {"0", "3", "6", "9"} and 0 < expected["3"]["piqa"]["acc"] < 1
    assert [results["tasks"] for results in runs.results(engine)] == [expected, expected]


@pytest.mark.parametrize("engine", ENGINES)
def test_metrics_are_those_of_all_processes(runs: Runs, engine: str) -> None:
    first, second = (results["metrics"] for results in runs.results(engine))
    one = runs.watcher.metrics
    assert list(one) == list(engine_runs.METRICS)
    for metric in ("gradient_norm", "peak_memory_bytes"):
        assert first[metric] == second[metric], "reduced over processes"
    assert first["learning_rate"] == one["learning_rate"] > 0
    assert first["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
    assert first["tokens_per_second"] > 0 and first["peak_memory_bytes"] > 1e8


@pytest.mark.parametrize("way", ["first", "other", "both", "killed"])
def test_a_process_that_fails_ends_the_others(forks: Forks, tmp_path: Path, way: str) -> None:
    start = time.monotonic()
    done = forks.run(SUPPORT / "failing_processes.py", way, folder=tmp_path)
    assert time.monotonic() - start < 25
    if way == "killed":
        assert done.returncode not in (0, 2)
    else:
        assert (done.returncode, done.stderr.count("the disk is full")) == (2, 1), done.stderr
        assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> tuple[Path, Any]:
    """A folder with a complete run of one process, and a function that gives the arguments of another run there."""
    base = tmp_path_factory.mktemp("launched")
    model, texts = model_folder(base / "model"), text_files(base / "texts")

    def train_arguments(name: str, *more: str) -> tuple[str, ...]:
        quick = ("evaluation=none", "callbacks.profile.enabled=false", "data=texts", "model.device=cpu")
        return arguments(model, texts, base, name, *quick, *more)

    done = forks.run(ROOT / "train.py", *train_arguments("one"), folder=base)
    assert done.returncode == 0, done.stderr[-2000:]
    return base, train_arguments


def assert_same_export(base: Path, name: str) -> None:
    expected, exported = (load_file(base / run / "model" / "model.safetensors") for run in ("one", name))
    assert expected.keys() == exported.keys()
    for key, value in expected.items():
        torch.testing.assert_close(exported[key], value, rtol=0, atol=2e-5)


def test_a_run_starts_its_own_processes(one: tuple[Path, Any], forks: Forks) -> None:
    """Also with a step that only the script's own folder has."""
    base, train_arguments = one
    (base / "program").mkdir()
    script = shutil.copy(ROOT / "train.py", base / "program" / "train.py")
    own_step = "from recondense.methods.cdmoe import CDMoE\n\n\nclass OwnStep(CDMoE):\n    pass\n"
    (base / "program" / "own_step.py").write_text(own_step)
    words = ("trainer=ddp", "trainer.devices=2", "method._target_=own_step.OwnStep")
    done = forks.run(script, *train_arguments("two", *words), folder=base)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_export(base, "two")
    assert done.stdout.count("results:") == 1 and done.stderr.count("recovery: step 6 of 6") == 1
    (first_cell,) = {line.partition(",")[0] for line in (base / "two/logs/metrics.csv").read_text().splitlines()[1:]}
    assert first_cell == "0", "one process writes the log"


@pytest.mark.slow  # twenty seconds, most of them imports
def test_a_run_of_torchrun(one: tuple[Path, Any]) -> None:
    base, train_arguments = one
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"),
            *(str(ROOT / "train.py"), *train_arguments("three", "trainer=deepspeed_zero3")),
        ],
        cwd=base, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_export(base, "three")


@pytest.fixture(scope="module")
def complete_runs(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """A folder with complete runs of one process and of engines on two."""
    folder = tmp_path_factory.mktemp("complete")
    model = model_folder(folder / "model")
    with one_command():
        engine_pipelines.run("auto", folder, model, teacher="cached", validate_every=3)
    done = forks.run(SUPPORT / "engine_pipelines.py", str(folder), str(model), *OF_COMPLETE_RUNS, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("engine", OF_COMPLETE_RUNS)
def test_engines_give_the_figures_of_one_process(complete_runs: Path, engine: str) -> None:
    """The original is offloaded while its predictions are on disk, and loaded back for the comparison."""
    expected, stages = (
        json.loads((complete_runs / name / "summary.json").read_text())["stages"] for name in ("auto", engine)
    )
    assert stages["recovered"].keys() == expected["recovered"].keys() >= {"kl_to_original"}
    for figure in ("loss", "kl_to_original"):
        assert stages["recovered"][figure] == pytest.approx(expected["recovered"][figure], rel=1e-3)
    assert not list((complete_runs / engine).rglob("original-*"))


def test_a_control_runs_on_the_device_of_the_recovery(complete_runs: Path) -> None:
    """Also if only the first process has the weights after the recovery."""
    for rank in range(2):
        devices = json.loads((complete_runs / f"devices-{rank}.json").read_text())
        assert devices == {"recovery": "cpu", "control": "cpu"}


def test_the_copy_that_is_trained_needs_no_second_memory() -> None:
    """ZeRO-2's copy shares the module's memory and an empty copy has none; both have their own parameter objects."""
    from recondense.recovery.engines import training_copy

    module = engine_runs.module_of()
    module_copy: RecoveryModule = training_copy.make_copy(module, module.objects_to_share(), empty=False)
    parameters, copy_parameters = dict(module.named_parameters()), dict(module_copy.named_parameters())
    assert parameters.keys() == copy_parameters.keys() and module_copy.tokenizer is module.tokenizer
    for name, value in parameters.items():
        assert copy_parameters[name] is not value and copy_parameters[name].data_ptr() == value.data_ptr()
        assert copy_parameters[name].requires_grad == value.requires_grad
    empty: RecoveryModule = training_copy.make_copy(module, module.objects_to_share(), empty=True)
    assert all(value.is_meta for value in empty.parameters()) and not any(b.is_meta for b in empty.buffers())
