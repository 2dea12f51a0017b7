"""Loggers: what they keep over restarts; W&B never asks for a key, never fails a run, and is offline in tests."""

import csv
import json
import os
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recondense.config.logger import LoggerConfig, WandbConfig
from recondense.report import tracking
from recondense.report.tracking import AppendingCSVLogger, flatten_summary, make_loggers
from recondense.report.wandb_run import Names, QuietWandbLogger

NAMES = Names("default-12345678", "compress")
SUMMARY = {
    "model": "tiny",
    "stages": {
        "original": {"perplexity": 90.0, "tasks": {"next_line": {"acc": 0.5}}, "profile": {"weights_bytes": 12}},
        "compressed": {"kl_to_original": 0.4},
    },
    "ratios": {"memory": 0.5},
    "parameters": {"total": {"original": 10, "compressed": 5}},
    "seconds": {"search": 1.5},
}


@pytest.fixture(autouse=True)
def _no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    yield


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_summary_metrics_have_fixed_names() -> None:
    assert flatten_summary(SUMMARY) == {
        "original/perplexity": 90.0,
        "original/next_line/acc": 0.5,
        "original/weights_bytes": 12,
        "compressed/kl_to_original": 0.4,
        "ratios/memory": 0.5,
        "parameters/total/original": 10,
        "parameters/total/compressed": 5,
        "seconds/search": 1.5,
    }
    assert flatten_summary({}) == {}


def test_csv_keeps_what_earlier_starts_logged(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "metrics.csv"
    first = AppendingCSVLogger(path)
    first.log_metrics({"loss": 2.0}, step=1)
    first.finalize("failed")
    second = AppendingCSVLogger(path, flush_every=1)
    second.log_metrics({"loss": 1.5}, step=1)
    second.log_metrics({"loss": 1.0, "kl": 0.5}, step=2)
    second.log_metrics({"kl": 0.25}, step=3)
    logged = rows(path)
    assert [(row["start"], row["step"], row["loss"], row["kl"]) for row in logged] == [
        ("0", "1", "2.0", ""),
        ("1", "1", "1.5", ""),
        ("1", "2", "1.0", "0.5"),
        ("1", "3", "", "0.25"),
    ]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.csv"]


def test_csv_drops_a_line_that_a_kill_left_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("start,step,loss\n0,1,2.0\n0,2,1.")
    logger = AppendingCSVLogger(path, flush_every=1)
    logger.log_metrics({"loss": 1.0}, step=2)
    assert [(row["start"], row["loss"]) for row in rows(path)] == [("0", "2.0"), ("1", "1.0")]


def test_csv_summary_is_the_last_row(tmp_path: Path) -> None:
    logger = AppendingCSVLogger(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 1.0}, step=7)
    tracking.log_summary([logger], SUMMARY)
    last = rows(tmp_path / "metrics.csv")[-1]
    assert last["step"] == "7" and last["original/perplexity"] == "90.0" and last["ratios/memory"] == "0.5"


def test_offline_run_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = LoggerConfig(csv=True, wandb=WandbConfig(mode="offline", tags=("test",)))
    picture = tmp_path / "plan.png"
    from matplotlib.figure import Figure

    Figure(figsize=(1, 1)).savefig(picture)
    plan = {"operations": [{"kind": "condense", "layer": 1, "experts": [3, 0], "coefficients": [0.1, 0.2]}]}
    ids = []
    for _ in range(2):  # the second is a restart of the first
        loggers = make_loggers(settings, tmp_path, {"seed": 0, "model": {"name": "tiny"}}, NAMES)
        assert [type(logger) for logger in loggers] == [AppendingCSVLogger, QuietWandbLogger]
        wandb_logger = loggers[1]
        assert isinstance(wandb_logger, QuietWandbLogger)
        ids.append(wandb_logger.experiment.id)
        assert wandb_logger.experiment.config["model"] == {"name": "tiny"}
        for logger in loggers:
            logger.log_metrics({"recovery/loss": 1.0}, step=1)
        tracking.log_plan(loggers, plan, picture)
        tracking.log_summary(loggers, SUMMARY)
        tracking.log_export(loggers, tmp_path / "model")
        summary = wandb_logger.experiment.summary
        assert summary["original/perplexity"] == 90.0 and summary["artifacts/model"] == str(tmp_path / "model")
        tracking.finish_loggers(loggers)
        assert not wandb_logger.broken
        time.sleep(1.1)  # W&B names the folder by the second
    assert ids[0] == ids[1] == (tmp_path / "logs" / "run_id").read_text()
    until = time.monotonic() + 20  # W&B's own process writes a little after `finish` has returned
    while len(list((tmp_path / "logs" / "wandb").rglob("picture*.png"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(list((tmp_path / "logs" / "wandb").glob(f"offline-run-*-{ids[0]}"))) == 2
    assert len(list((tmp_path / "logs").rglob("*.table.json"))) == 2
    assert len(list((tmp_path / "logs" / "wandb").rglob("picture*.png"))) == 2
    table = json.loads(next((tmp_path / "logs").rglob("*.table.json")).read_text())
    assert table["columns"] == ["order", "kind", "layer", "experts", "coefficients"]
    assert table["data"] == [[1, "condense", 1, "3 0", "0.1 0.2"]]
    assert os.environ.get("WANDB_MODE") is None
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_all_loggers_can_be_off(tmp_path: Path) -> None:
    assert make_loggers(LoggerConfig(csv=False, wandb=WandbConfig(mode="disabled")), tmp_path, {}, NAMES) == []
    assert not list(tmp_path.iterdir())


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", bytes(200), b"[]\n", b"a,b\n1,2\n", b"start,step\nx,y\n", b'start,step\n"1,2\n']
)
def test_a_damaged_log_is_moved_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    logger = AppendingCSVLogger(path)
    logger.log_metrics({"loss": 1.0}, 3)
    logger.save()
    assert [(row["start"], row["step"], row["loss"]) for row in _rows(path)] == [("0", "3", "1.0")]
    [aside] = tmp_path.glob("metrics.damaged-*.csv")
    assert aside.read_bytes() == content


def test_a_folder_in_place_of_a_log_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").mkdir()
    logger = AppendingCSVLogger(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 1.0}, 3)
    logger.save()
    assert len(_rows(tmp_path / "metrics.csv")) == 1


def test_a_log_that_cannot_be_written_ends_nothing_and_loses_no_row(tmp_path: Path) -> None:
    """The rows wait until there is room, also if only a part of them could be written."""
    path = tmp_path / "metrics.csv"
    logger = AppendingCSVLogger(path, flush_every=1)
    logger.log_metrics({"loss": 0.0}, 0)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 4, limits[1]))
        logger.log_metrics({"loss": 1.0}, 1)
        logger.log_metrics({"loss": 2.0, "new": 1.0}, 2)
        assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    logger.log_metrics({"loss": 3.0}, 3)
    assert [row["loss"] for row in _rows(path)] == ["0.0", "1.0", "2.0", "3.0"]
    assert [row["new"] for row in _rows(path)] == ["", "", "1.0", ""]


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"a b\n", bytes(8), "folder", "loop"])
def test_a_damaged_run_id_is_replaced(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "run_id"
    if content == "folder":
        path.mkdir()
    elif content == "loop":
        path.symlink_to(path.name)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    first = tracking._stored_id(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{8}", first) and tracking._stored_id(tmp_path) == first


def test_the_table_of_a_plan_has_widths_instead_of_masks() -> None:
    row = tracking._plan_row(1, {"kind": "narrow", "layer": 2, "masks": ["f0f", "3"], "compensate": True})
    assert row == {"order": 1, "kind": "narrow", "layer": 2, "widths": "8 2", "compensate": True}
