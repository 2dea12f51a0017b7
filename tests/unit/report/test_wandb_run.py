"""A run of W&B starts in bounded time whatever the server, the variables and the folders; else it is logged offline."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.wandb_records import OfflineRun, offline_runs, read_run
from support.wandb_server import closed_port, server, silent_server

from recondense.config.logger import LoggerConfig, WandbConfig
from recondense.config.schema import from_dict
from recondense.report import wandb_run
from recondense.report.tracking import AppendingCSVLogger, finish_loggers, make_loggers
from recondense.report.wandb_run import Names, QuietWandbLogger, names_of, run_arguments, wandb_mode

NAMES = Names("default-12345678", "compress", ("tiny", "cdmoe", "", "tiny"))
# Starts an online run with each server in turn, logs one figure, and prints the seconds that the start took.
SCRIPT = """
import json, logging, os, sys, time
from pathlib import Path
from recondense.config.logger import LoggerConfig, WandbConfig
from recondense.report import wandb_run
from recondense.report.tracking import finish_loggers, make_loggers
from recondense.report.wandb_run import Names

wandb_run.PROBE_SECONDS, wandb_run.INIT_SECONDS = 2.0, 3.0
for name, address in json.loads(sys.argv[1]).items():
    os.environ["WANDB_BASE_URL"] = address
    logging.basicConfig(filename=f"{name}.txt", level=logging.INFO, force=True)
    started = time.monotonic()
    settings = LoggerConfig(csv=False, wandb=WandbConfig(mode="auto"))
    loggers = make_loggers(settings, Path(name), {}, Names("run", "test"))
    seconds = time.monotonic() - started
    for logger in loggers:
        logger.log_metrics({"loss": 1.5}, step=3)
    finish_loggers(loggers)
    print("start", name, seconds)
"""
# The server ends after the start.
STOPPING = """
import os, time
from pathlib import Path
from recondense.config.logger import LoggerConfig
from recondense.report import wandb_run
from recondense.report.tracking import finish_loggers, make_loggers
from support.wandb_server import server

wandb_run.FINISH_SECONDS = 8.0
with server(200, 0) as os.environ["WANDB_BASE_URL"]:
    loggers = make_loggers(LoggerConfig(csv=False), Path("."), {}, wandb_run.Names("run", "test"))
    loggers[0].log_metrics({"loss": 1.5}, step=3)
started = time.monotonic()
finish_loggers(loggers)
print(time.monotonic() - started)
"""


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SILENT"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in wandb_run.FOLDERS:
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))


def test_without_a_working_server_the_log_is_offline(tmp_path: Path) -> None:
    """A closed port, no host, and servers that never answer, fail, refuse, or stop after their first answer."""
    assert wandb_run.PROBE_SECONDS + wandb_run.INIT_SECONDS <= 13
    with (
        silent_server() as silent,
        server(500, 500) as failing,
        server(401, 401) as refusing,
        server(200, None) as stuck,
    ):
        servers = {
            "closed": closed_port(),
            "silent": silent,
            "failing": failing,
            "refusing": refusing,
            "stuck": stuck,
            "nowhere": "http://no-such-host.invalid",
        }
        printed = run_script(SCRIPT, tmp_path, json.dumps(servers))
    seconds = dict(line.split()[1:] for line in printed.splitlines() if line.startswith("start"))
    assert list(seconds) == list(servers) and all(float(value) < 45 for value in seconds.values()), (
        seconds
    )  # busy machine
    for name in servers:
        [run] = offline_runs(tmp_path / name / "logs")
        assert run.logged("loss") == {3: 1.5}, name
        lines = [line for line in (tmp_path / f"{name}.txt").read_text().splitlines() if "W&B" in line]
        assert len(lines) == 1 and "logged offline" in lines[0] and "`wandb sync`" in lines[0], (name, lines)


def run_script(script: str, folder: Path, *arguments: str) -> str:
    """Run a script with a key of W&B, and return what it prints."""
    environment = {**os.environ, "WANDB_API_KEY": "a" * 40, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_a_server_that_stops_during_the_run_does_not_stop_its_end(tmp_path: Path) -> None:
    printed = run_script(STOPPING, tmp_path)
    assert float(printed.split()[-1]) < 45, "much less on a machine that is not busy"
    [path] = (tmp_path / "logs" / "wandb").glob("run-*/*.wandb")
    assert read_run(path).logged("loss") == {3: 1.5}, "`wandb sync` can upload it"


def log_one(folder: Path, **wandb: Any) -> OfflineRun:
    """Log one figure and one table offline; return what is in the file."""
    loggers = make_loggers(LoggerConfig(csv=False, wandb=WandbConfig(mode="offline", **wandb)), folder, {}, NAMES)
    [logger] = loggers
    assert isinstance(logger, QuietWandbLogger)
    logger.log_metrics({"loss": 1.5}, step=3)
    assert not logger.attempt(logger.log_table, "table", columns=["a", "b"], data=[[1, "x"], [2.5, None]])
    finish_loggers(loggers)
    [run] = offline_runs(folder / "logs")
    assert run.logged("loss") == {3: 1.5}
    assert run.table("table") == {"columns": ["a", "b"], "data": [[1, "x"], [2.5, None]], **rest(run)}
    return run


def rest(run: OfflineRun) -> dict[str, Any]:
    return {key: value for key, value in run.table("table").items() if key not in ("columns", "data")}


@pytest.mark.parametrize("where", ["below a file", "in /proc", "WANDB_DIR"])
def test_folders_that_cannot_be_written_are_replaced(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    place = "/proc/none" if where == "in /proc" else str(tmp_path / "file" / "below")
    for name in ("WANDB_DIR",) if where == "WANDB_DIR" else wandb_run.FOLDERS:
        monkeypatch.setenv(name, place)
    log_one(tmp_path / "run")
    assert caplog.text.count("is not writable") == (0 if where == "WANDB_DIR" else 3)


@pytest.mark.parametrize(
    "variables",
    [{"WANDB_MODE": "nonsense"}, {"WANDB_BASE_URL": "nonsense"}, {"WANDB_SILENT": "maybe", "WANDB_RESUME": "perhaps"}],
    ids=str,
)
def test_variables_that_wandb_cannot_read_do_not_cost_the_log(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    wandb.teardown()  # else it does not read the variables again
    for name, value in {**variables, "WANDB_PROJECT": "theirs"}.items():
        monkeypatch.setenv(name, value)
    assert log_one(tmp_path / "run").run.project == "theirs"
    assert {name: os.environ[name] for name in variables} == variables


def test_a_sweep_of_an_agent_keeps_its_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()
    for name, value in {"PROJECT": "agents", "SWEEP_ID": "sweep1", "RUN_ID": "fromagent", "TAGS": "night"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = log_one(tmp_path / "run").run
    assert (run.project, run.sweep_id) == ("agents", "sweep1")
    assert list(run.tags) == ["night", "tiny", "cdmoe"] and run.job_type == "compress"


def test_the_config_names_the_run_before_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_arguments(WandbConfig(), NAMES) == {
        "project": "recondense", "entity": None, "name": "default-12345678", "group": None, "job_type": "compress",
        "tags": ["tiny", "cdmoe"], "notes": None,
    }  # fmt: skip
    for name in ("PROJECT", "NAME", "RUN_GROUP", "JOB_TYPE", "TAGS", "NOTES", "ENTITY"):
        monkeypatch.setenv(f"WANDB_{name}", name.lower())
    assert run_arguments(WandbConfig(), NAMES) == {
        "project": "project", "entity": "entity", "name": "name", "group": "run_group", "job_type": "job_type",
        "tags": ["tags", "tiny", "cdmoe"], "notes": "notes",
    }  # fmt: skip
    config = WandbConfig(project="p", entity="e", name="n", group="g", job_type="j", tags=("t",), notes="why")
    assert list(run_arguments(config, NAMES).values()) == ["p", "e", "n", "g", "j", ["t", "tiny", "cdmoe"], "why"]


def test_a_run_is_tagged_with_its_model_method_and_recovery() -> None:
    config = from_dict({"model": {"name": "m" * 80}, "method": {"name": "reap", "steps": []}})
    names = names_of(config)
    assert names.name == f"default-{config.run_hash()}" and names.job_type == "compress"
    assert run_arguments(WandbConfig(), names)["tags"] == ["m" * 64, "reap", "none"]


def test_a_disabled_run_has_no_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DISABLED", "true")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    loggers = make_loggers(LoggerConfig(), tmp_path, {}, NAMES)
    assert [type(logger) for logger in loggers] == [AppendingCSVLogger]
    assert wandb_mode("offline") == "offline", "the config says it"


def test_mode_follows_the_login(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert wandb_mode("auto") == "offline"
    assert wandb_mode("disabled") == "disabled"
    with caplog.at_level(logging.WARNING):
        assert wandb_mode("online") == "offline"  # asking for a key would be a prompt
    assert "no login" in caplog.text
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0\n")
    assert wandb_mode("auto") == wandb_mode("online") == "online"
    assert wandb_mode("offline") == "offline"
    (tmp_path / "netrc").write_text("machine elsewhere login user password 0\n")
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0")
    assert wandb_mode("auto") == "online"


def test_a_failing_start_of_wandb_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def fail(**_: Any) -> None:
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", fail)
    with caplog.at_level(logging.WARNING):
        loggers = make_loggers(LoggerConfig(wandb=WandbConfig(mode="offline")), tmp_path, {}, NAMES)
    assert [type(logger) for logger in loggers] == [AppendingCSVLogger]
    assert "no service" in caplog.text


def test_a_failure_of_wandb_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def log(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("gone")

    logger = QuietWandbLogger(experiment=Broken())  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        logger.log_metrics({"loss": 1.0}, step=0)
        logger.log_metrics({"loss": 1.0}, step=1)
    assert caplog.text.count("logging of metrics stopped") == 1


def test_a_failing_picture_does_not_stop_the_metrics(caplog: pytest.LogCaptureFixture) -> None:
    logged: list[Any] = []

    class Run:
        def log(self, metrics: Any, **_: Any) -> None:
            logged.append(metrics)

    def fail() -> None:
        raise OSError("no room")

    logger = QuietWandbLogger(experiment=Run())  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        assert logger.attempt(fail)
        logger.log_metrics({"loss": 1.0}, step=1)
    assert logged and "OSError: no room" in caplog.text and not logger.broken
