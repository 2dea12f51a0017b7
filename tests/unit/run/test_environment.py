"""A launcher is recognized by all of its variables together; what other programs left is removed."""

from __future__ import annotations

import os

import pytest

from recondense.errors import UserError
from recondense.run.environment import Started, forget_other_programs, naming_variables, started_together

TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4",
    "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train", "SLURM_STEP_NODELIST": "gpu[07-08,12]",
}  # fmt: skip
LEFT_OVER: list[dict[str, str]] = [
    {"LOCAL_WORLD_SIZE": "1"},
    {"WORLD_SIZE": "8"},
    {"RANK": "1"},
    {"LOCAL_RANK": "3"},
    {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
    {name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"},
    {**TORCHRUN, "RANK": "8"},
    {**TORCHRUN, "LOCAL_RANK": "4"},
    {**TORCHRUN, "RANK": "0"},
    {**TORCHRUN, "WORLD_SIZE": "2"},
    {**TORCHRUN, "RANK": "first"},
    {**TORCHRUN, "RANK": "-1"},
    {**TORCHRUN, "RANK": ""},
    {**TORCHRUN, "MASTER_PORT": "0"},
    {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "job", "SLURM_NODELIST": "a"},
    {**SRUN, "SLURM_JOB_NAME": "bash"},
    {**SRUN, "SLURM_JOB_NAME": "interactive"},
    {**SRUN, "SLURM_PTY_PORT": "41234"},
    {**SRUN, "SLURM_PROCID": "4"},
    {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMI_RANK": "1", "PMI_SIZE": "2"},
    {"JSM_NAMESPACE_RANK": "1", "LSB_JOBID": "3", "LSB_DJOB_RANKFILE": "/nowhere"},
]
READ_BY_LIBRARIES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "JSM_NAMESPACE_RANK",
                     "LSB_DJOB_RANKFILE", "TORCHELASTIC_USE_AGENT_STORE", "OMPI_COMM_WORLD_RANK")  # fmt: skip


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # nothing of it reaches the other tests
    for name in tuple(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in {**TORCHRUN, "NODE_RANK": ""}:
            del os.environ[name]


@pytest.mark.parametrize("variables", LEFT_OVER)
def test_variables_that_are_left_over(variables: dict[str, str]) -> None:
    assert started_together(variables) is None
    os.environ.update(variables)
    forget_other_programs()
    assert [name for name in READ_BY_LIBRARIES if name in os.environ] == []
    assert started_together() is None


def test_torchrun() -> None:
    assert started_together(TORCHRUN) == Started(5, 1, 1, 8, "node1", 29500, "torchrun")
    os.environ.update(TORCHRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"})
    forget_other_programs()
    assert TORCHRUN.items() <= os.environ.items() and "SLURM_PROCID" not in os.environ


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, "gpu07"),
        ({"SLURM_STEP_NODELIST": "a1,a2"}, "a1"),
        ({"SLURM_STEP_NODELIST": "a[3]"}, "a3"),
        ({"MASTER_ADDR": "head"}, "head"),
        ({"SLURM_STEP_NODELIST": "a1", "MASTER_ADDR": "10.0.0.1"}, "127.0.0.1"),
    ],
)
def test_srun(variables: dict[str, str], address: str) -> None:
    """On one machine the address is this machine's, whatever variables say."""
    assert started_together(SRUN | variables) == Started(3, 1, 1, 4, address, 18456, "srun")
    os.environ.update(SRUN | {"WORLD_SIZE": "8", "RANK": "0"})
    forget_other_programs()
    assert SRUN.items() <= os.environ.items() and "RANK" not in os.environ


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "TkAgg", "", "nonsense"])
def test_a_backend_for_pictures_of_another_program(backend: str) -> None:
    os.environ["MPLBACKEND"] = backend
    forget_other_programs()
    assert os.environ["MPLBACKEND"] == "Agg"


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon", ValueError("invalid literal for int() with base 10: 'soon'")),
        (
            "TORCH_LOGS",
            "+nonsense",
            RuntimeError("Invalid settings: +nonsense, must be a list\nValid are all"),
        ),
        ("TRANSFORMERS_VERBOSITY", "loud", KeyError("loud")),
        ("HF_ENDPOINT", "https://mirror", ValueError("cannot use https://mirror.")),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "9s", ValueError("invalid literal for int() with base 10: '9s'")),
    ],
)
def test_a_variable_that_a_library_refuses(name: str, value: str, error: Exception) -> None:
    os.environ[name] = value
    with pytest.raises(UserError, match="a library refuses this variable") as refused, naming_variables():
        raise error
    assert str(refused.value).startswith(f"{name}={value}: ") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("HF_HUB_OFFLINE", "on", "a connection of the function is gone"),  # inside other words
        ("TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT", "10000", "expected 10000 rows"),
        ("TOKENIZERS_PARALLELISM", "false", "the value is false"),
        ("HF_HOME", "/root", "no module at /root/project/model.py"),
        ("HF_HOME", "", "no module"),
        ("TORCH_HOME", "data", "the database is older"),
    ],
)
def test_a_value_that_an_error_has_by_chance_is_not_blamed(name: str, value: str, text: str) -> None:
    os.environ[name] = value
    with pytest.raises(RuntimeError, match=f"^{text}$"), naming_variables():
        raise RuntimeError(text)


def test_other_errors_of_an_import_keep_their_type() -> None:
    os.environ["HF_TOKEN"] = "secret"
    for text in ("a defect of ours", "secret"):
        with pytest.raises(ValueError, match=f"^{text}$"), naming_variables():
            raise ValueError(text)
