"""Recovery on two processes, by engines that are really started: the curve, the checkpoints and the weights of one."""

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
from support.runs import arguments, model_folder, one_command, paper_tasks, text_files
from torch import Tensor

from recondense.recovery.module import RecoveryModule

ENGINES = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")
ALL = (*ENGINES, *engine_runs.SHORT_ALONE)
SPREAD = ("fsdp2", "deepspeed_zero2")  # of whole runs
HERE = Path(__file__).parents[1] / "support"
# Lightning says so of every fit that goes on.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # of a checkpoint that was copied
]


class Runs:
    """The same training by one process, and by each engine on two, killed once."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder = folder
        self.tasks = paper_tasks(folder / "tasks")
        self.module, self.watcher = engine_runs.train(
            "auto", folder / "one", tasks=engine_runs.TASKS, task_folder=self.tasks
        )
        self.process = forks.run(HERE / "engine_runs.py", str(folder), str(self.tasks), *ALL, folder=folder)

    def seen(self, engine: str) -> list[dict[str, Any]]:
        assert self.process.returncode == 0, self.process.stderr[-3000:]
        return [json.loads((self.folder / f"{engine}-{rank}.json").read_text()) for rank in range(2)]

    def same_weights(self, found: dict[str, Tensor]) -> None:
        for name, value in self.module.model.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=5e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Runs:
    return Runs(tmp_path_factory.mktemp("engines"), forks)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(runs: Runs, engine: str) -> None:
    """Killed at step 6, gone on from the checkpoint of step 4; condensed layer, and low-rank experts without tokens."""
    first, second = runs.seen(engine)
    losses = {int(step): loss for step, loss in first["losses"].items()}
    assert losses == pytest.approx(runs.watcher.losses, abs=1e-4) and len(losses) == engine_runs.STEPS
    assert max(losses.values()) > 1.5 * min(losses.values()), "a curve that is flat shows nothing"
    assert first["losses"] == second["losses"]
    assert first["repeated_differences"] == pytest.approx([0, 0], abs=1e-6)
    assert min(first["idle"], second["idle"]) > 0, "each process had experts without tokens"
    for step, found in runs.watcher.validation.items():  # three windows, which two do not divide
        assert first["validation"][str(step)] == pytest.approx(found, abs=1e-5)
    runs.same_weights(torch.load(runs.folder / engine / "weights-0.pt"))


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
    rounding = 3e-2 if name.startswith("bf16") else 1e-4
    for found in runs.seen(engine):
        assert found["short"][name] == pytest.approx(losses[name], rel=rounding) and len(losses[name]) >= 2


@pytest.mark.parametrize("engine", ALL)
@pytest.mark.parametrize("name", engine_runs.MOMENTS)
def test_gradients_have_the_size_of_one_process(
    runs: Runs, short: tuple[Path, dict[str, list[float]]], engine: str, name: str
) -> None:
    for seen in runs.seen(engine):
        assert seen["short"][name] == pytest.approx(short[1][name], rel=1e-4)
    found, expected = engine_runs.moments(runs.folder / engine / name), engine_runs.moments(short[0] / name)
    for moment, norms in expected.items():
        assert found[moment] == pytest.approx(norms, rel=1e-3)


def test_the_clipped_case_is_clipped(short: tuple[Path, dict[str, list[float]]]) -> None:
    clipped, free = (engine_runs.moments(short[0] / name)["exp_avg"] for name in ("clipped", "accumulated"))
    assert max(clipped) < 1e-4 < 0.1 * max(free)


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_weights_cost_nothing(runs: Runs, engine: str) -> None:
    found = runs.seen(engine)
    moments = 2 * sum(value.numel() for value in engine_runs.module_of().parameters() if value.requires_grad)
    states = [each["state_elements"] for each in found]
    assert [each["frozen_gradients"] for each in found] == [0, 0]
    assert states == [moments, moments] if engine == "ddp" else moments <= sum(states) <= 1.01 * moments
    sharded = engine in ("fsdp2", "deepspeed_zero3")
    assert [each["hollow"] for each in found] == [False, sharded], "one whole copy, where weights are spread"


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_goes_on_where_two_were(runs: Runs, engine: str, tmp_path: Path) -> None:
    runs.seen(engine)
    name = f"step={2 * engine_runs.CHECKPOINT_EVERY}.ckpt"
    shutil.copy(runs.folder / engine / name, tmp_path)
    found = torch.load(tmp_path / name, weights_only=True)
    names = {name for name, value in engine_runs.module_of().named_parameters() if value.requires_grad}
    assert set(found["state_dict"]) == names, "a checkpoint holds what trains"
    module, watcher = engine_runs.train("auto", tmp_path)
    assert sorted(watcher.losses) == [9, 10]
    runs.same_weights(module.model.state_dict())


@pytest.mark.parametrize("engine", ALL)
def test_two_processes_go_on_where_one_was(runs: Runs, engine: str) -> None:
    expected = {step: runs.watcher.losses[step] for step in (9, 10)}
    for found in runs.seen(engine):
        assert {int(step): loss for step, loss in found["resumed"].items()} == pytest.approx(expected, abs=1e-4)
    runs.same_weights(torch.load(runs.folder / f"{engine}-resumed" / "weights.pt"))


@pytest.mark.parametrize("engine", ENGINES)
def test_lm_eval_while_training(runs: Runs, engine: str) -> None:
    expected = json.loads(json.dumps(runs.module.task_results))
    assert set(expected) == {"3", "6", "9"} and 0 < expected["3"]["piqa"]["acc"] < 1
    assert [found["tasks"] for found in runs.seen(engine)] == [expected, expected]


@pytest.mark.parametrize("way", ["first", "other", "both", "killed"])
def test_a_process_that_fails_ends_the_others(forks: Forks, tmp_path: Path, way: str) -> None:
    started = time.monotonic()
    ended = forks.run(HERE / "failing_processes.py", way, folder=tmp_path)
    assert time.monotonic() - started < 25
    if way == "killed":
        assert ended.returncode not in (0, 2)
    else:
        assert (ended.returncode, ended.stderr.count("the disk is full")) == (2, 1), ended.stderr
        assert "Traceback" not in ended.stderr


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> tuple[Path, Any]:
    """A whole run of one process, and what starts another beside it."""
    base = tmp_path_factory.mktemp("launched")
    model, texts = model_folder(base / "model"), text_files(base / "texts")

    def command(name: str, *more: str) -> tuple[str, ...]:
        quick = ("evaluation=none", "callbacks.profile.enabled=false", "data=texts", "model.device=cpu")
        return arguments(model, texts, base, name, *quick, *more)

    ended = forks.run(engine_runs_root() / "train.py", *command("one"), folder=base)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return base, command


def engine_runs_root() -> Path:
    return HERE.parents[1]


def same_export(base: Path, name: str) -> None:
    expected, found = (load_file(base / run / "model" / "model.safetensors") for run in ("one", name))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-5)


def test_a_run_starts_its_own_processes(one: tuple[Path, Any], forks: Forks) -> None:
    base, command = one
    script = engine_runs_root() / "train.py"
    ended = forks.run(script, *command("two", "trainer=ddp", "trainer.devices=2"), folder=base)
    assert ended.returncode == 0, ended.stderr[-2000:]
    same_export(base, "two")
    assert ended.stdout.count("results:") == 1 and ended.stderr.count("recovery: step 6 of 6") == 1
    (start,) = {line.partition(",")[0] for line in (base / "two/logs/metrics.csv").read_text().splitlines()[1:]}
    assert start == "0", "one process writes the log"


def test_a_run_of_torchrun(one: tuple[Path, Any]) -> None:
    base, command = one
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"),
            *(str(engine_runs_root() / "train.py"), *command("three", "trainer=deepspeed_zero3")),
        ],
        cwd=base, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    same_export(base, "three")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """Whole runs of one process and of engines on two."""
    folder = tmp_path_factory.mktemp("measured")
    model = model_folder(folder / "model")
    with one_command():
        engine_pipelines.run("auto", folder, model, teacher="cached", validate_every=3)
    ended = forks.run(HERE / "engine_pipelines.py", str(folder), str(model), *SPREAD, folder=folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


@pytest.mark.parametrize("engine", SPREAD)
def test_engines_that_spread_measure_the_same(measured: Path, engine: str) -> None:
    """The original is away while its predictions are on disk, and there again to be compared with."""
    one, found = (json.loads((measured / name / "summary.json").read_text())["stages"] for name in ("auto", engine))
    assert found["recovered"].keys() == one["recovered"].keys() >= {"kl_to_original"}
    for figure in ("loss", "kl_to_original"):
        assert found["recovered"][figure] == pytest.approx(one["recovered"][figure], rel=1e-3)
    assert not list((measured / engine).rglob("original-*"))


def test_a_control_computes_where_the_recovery_did(measured: Path) -> None:
    """Also where the recovery has left the weights to the first process."""
    for rank in range(2):
        found = json.loads((measured / f"devices-{rank}.json").read_text())
        assert found == {"recovery": "cpu", "control": "cpu"}


def test_a_twin_is_no_second_copy() -> None:
    """ZeRO-2's twin lies on the module's memory, an empty one on none; both compute with parameters of their own."""
    from recondense.recovery.engines import twin as twin_module

    module = engine_runs.module_of()
    twin: RecoveryModule = twin_module.make_twin(module, module.objects_to_share(), empty=False)
    own, theirs = dict(module.named_parameters()), dict(twin.named_parameters())
    assert own.keys() == theirs.keys() and twin.tokenizer is module.tokenizer
    for name, value in own.items():
        assert theirs[name] is not value and theirs[name].data_ptr() == value.data_ptr()
        assert theirs[name].requires_grad == value.requires_grad
    empty: RecoveryModule = twin_module.make_twin(module, module.objects_to_share(), empty=True)
    assert all(value.is_meta for value in empty.parameters()) and not any(b.is_meta for b in empty.buffers())
