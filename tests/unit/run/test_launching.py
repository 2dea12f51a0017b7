"""How many processes a run has, and what is refused before any of them loads weights."""

from __future__ import annotations

import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks import run_messages

from recondense import processes
from recondense.config.schema import Config, RecoveryConfig, TrainerConfig
from recondense.errors import UserError
from recondense.run import launching
from recondense.run.environment import ADDRESS, RANKS, SRUN


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RANKS, *ADDRESS, *SRUN, "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)


def set_torchrun(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    numbers = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "RANK": 0, "LOCAL_RANK": 0, "MASTER_PORT": 29500}
    for name, number in numbers.items():
        monkeypatch.setenv(name, str(number))
    monkeypatch.setenv("MASTER_ADDR", "localhost")


def test_processes_of_settings_or_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = TrainerConfig(devices="auto")
    assert launching.plan_processes(TrainerConfig(), gpu=False).world_size == 1
    assert launching.plan_processes(auto, gpu=False).world_size == 1
    nodes = TrainerConfig(devices=3, num_nodes=2)
    with pytest.raises(ValueError, match=r"trainer\.num_nodes=2: the address of the first machine is unknown"):
        launching.plan_processes(nodes, gpu=False)
    with monkeypatch.context() as patch:
        patch.setenv("MASTER_ADDR", "10.0.0.1")
        patch.setenv("MASTER_PORT", "29500")
        patch.setenv("NODE_RANK", "1")
        planned = launching.plan_processes(nodes, gpu=False)
        assert planned.world_size == 6
        values = launching._environment(planned)
        assert {
            "RANK": "3",
            "NODE_RANK": "1",
            "MASTER_ADDR": "10.0.0.1",
            "MASTER_PORT": "29500",
        }.items() <= values.items()
        for name, value in (("NODE_RANK", "2"), ("NODE_RANK", "first"), ("MASTER_PORT", "99999")):
            with monkeypatch.context() as wrong:
                wrong.setenv(name, value)
                with pytest.raises(UserError, match=f"{name}={value}: must be"):
                    launching.plan_processes(nodes, gpu=False)
    set_torchrun(monkeypatch, 4)
    planned = launching.plan_processes(auto, gpu=False)
    assert (planned.on_node, planned.nodes) == (4, 1) and planned.started is not None
    with pytest.raises(ValueError, match="4 processes were started; use"):
        launching.plan_processes(TrainerConfig(), gpu=False)
    assert "-m: 4 processes" in str(launching.check_sweep()[0])


@pytest.mark.parametrize(
    "left_over",
    [
        {"NODE_RANK": "1", "GROUP_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"},
        {"WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99999999"},
        {"RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    ],
)
def test_on_one_machine_other_programs_decide_nothing(
    monkeypatch: pytest.MonkeyPatch, left_over: dict[str, str]
) -> None:
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    values = launching._environment(launching.plan_processes(TrainerConfig(devices=2), gpu=False))
    assert 0 < int(values.pop("MASTER_PORT")) < 65536
    assert values == {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "False",
    }  # fmt: skip


def test_other_processes_import_from_the_same_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of train.py's folder too, wherever the command is run."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "own_step.py").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "beside")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("RANK", "0")
    [child] = launching._start(launching.Processes(2, 1), [sys.executable, "-c", "import own_step, recondense"])
    assert child.wait(timeout=60) == 0


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo"])
def test_the_timeout_of_plain_data_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Where tensors also use NCCL, plain data has a group of its own."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    timeout = timedelta(hours=7)
    processes.join_group(backend, timeout)
    try:
        group: Any = processes._group()
        assert (group is None) == (backend == "gloo")
        group = group or torch.distributed.group.WORLD
        assert group._get_backend(torch.device("cpu")).options._timeout == timeout
    finally:
        processes.leave_group()


@pytest.mark.parametrize(
    ("trainer", "recovery", "message"),
    [
        ({"devices": 3}, {"batch_size": 8}, "recovery.batch_size=8: each of 3 processes needs an equal part"),
        ({"strategy": "fsdp2"}, {"trainable": "lora"}, "recovery.trainable=lora: adapters can only be merged"),
        (
            {"strategy": "deepspeed_zero3", "precision": "bf16-mixed"}, {},
            "trainer.precision=bf16-mixed: DeepSpeed would round all weights of a model in float32",
        ),
    ],
)  # fmt: skip
def test_problems_that_are_found_before_weights_load(
    trainer: dict[str, Any], recovery: dict[str, Any], message: str
) -> None:
    from recondense.config.schema import ModelConfig

    model = ModelConfig(dtype="float32", device="cpu", pretrain={"vocab_size": 97, "config": {}})
    settings = RecoveryConfig(objective="finetune", **recovery)
    problems = run_messages(Config(model=model, recovery=settings, trainer=TrainerConfig(**trainer)), [])
    assert [problem for problem in problems if problem.startswith(message)], problems
