"""Loggers of a run: one csv file across restarts, and Weights & Biases, whose errors never stop a run."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from recondense.config.logger import LoggerConfig
from recondense.files import append, discard, write_aside
from recondense.full_disk import DiskFull
from recondense.report.wandb_run import (
    Names,
    QuietWandbLogger,
    is_first_rank,
    run_arguments,
    start_wandb,
    wandb_mode,
)

log = logging.getLogger(__name__)


def make_loggers(
    settings: LoggerConfig, run_folder: Path, resolved_config: Mapping[str, Any], names: Names
) -> list[Logger]:
    """Return the loggers that the settings request. All their files are below `run_folder/logs`.

    Args:
        settings: csv on or off; mode and names of W&B.
        run_folder: the run's folder. It also stores the id of the W&B run, so a resumed run logs to the same one.
        resolved_config: config of the W&B run, as plain containers.
        names: what the W&B run is called where the settings do not say it.

    Returns:
        The csv logger first. W&B is missing if it is disabled or does not start; the latter is logged as a warning.
    """
    folder = Path(run_folder) / "logs"
    loggers: list[Logger] = []
    if settings.csv:
        loggers.append(AppendingCSVLogger(folder / "metrics.csv"))
    mode = wandb_mode(settings.wandb.mode)
    if mode != "disabled" and is_first_rank():
        arguments = run_arguments(settings.wandb, names)
        loggers += start_wandb(mode, folder, arguments, resolved_config, _stored_id(folder))
    return loggers


def log_summary(loggers: Sequence[Logger], summary: Mapping[str, Any]) -> None:
    """Log the figures of a run: as summary metrics in W&B, and as the last row of the csv file."""
    metrics = flatten_summary(summary)
    for logger in loggers:
        if isinstance(logger, QuietWandbLogger):
            logger.attempt(logger.experiment.summary.update, metrics)
        elif isinstance(logger, AppendingCSVLogger):
            logger.log_metrics(metrics, logger.last_step)
            logger.save()


def flatten_summary(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of `summary.json` under fixed names.

    Examples are `original/perplexity`, `compressed/<task>/<metric>`, `recovered/decode_tokens_per_second`,
    `ratios/memory`, `parameters/routed_experts/compressed`, `refit/<layer>/error_after`,
    `<recovery stage>/<layer>/error_after` of a local recovery, `round-1/perplexity`, and `seconds/search`.
    Figures that were not measured are absent.
    """
    metrics: dict[str, float] = {}
    for stage, values in summary.get("stages", {}).items():
        for key, value in values.items():
            # `tasks` and `profile` are levels of the file that do not occur in the names of metrics.
            metrics.update(_numbers(value, stage if key in ("tasks", "profile") else f"{stage}/{key}"))
    for stage in summary.get("recovery_stages") or ():
        metrics.update(_numbers(stage.get("layers", {}), stage["name"]))
    for number, figures in enumerate(summary.get("rounds") or (), start=1):
        metrics.update(_numbers(figures, f"round-{number}"))
    for section in ("ratios", "parameters", "bytes_on_disk", "refit", "seconds"):
        metrics.update(_numbers(summary.get(section, {}), section))
    return metrics


def log_plan(loggers: Sequence[Logger], plan: Mapping[str, Any], picture: Path | None) -> None:
    """Log a plan to W&B as a table (one row per operation) and as a picture. The csv logger ignores both."""
    rows = [_plan_row(number, operation) for number, operation in enumerate(plan.get("operations", ()), start=1)]
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    data = [[row.get(column) for column in columns] for row in rows]
    for logger in loggers:
        if isinstance(logger, QuietWandbLogger):
            logger.attempt(logger.log_table, "plan/operations", columns=columns, data=data)
            if picture is not None:
                logger.attempt(logger.log_image, "plan/picture", [str(picture)])


def log_export(loggers: Sequence[Logger], folder: Path) -> None:
    """Record the folder of the exported model in the W&B run."""
    for logger in loggers:
        if isinstance(logger, QuietWandbLogger):
            logger.attempt(logger.experiment.summary.update, {"artifacts/model": str(folder)})


def finish_loggers(loggers: Sequence[Logger]) -> None:
    """Write all pending rows and close the W&B run, so that the next run of a sweep starts a new one."""
    for logger in loggers:
        logger.save()
        if isinstance(logger, QuietWandbLogger):
            logger.attempt(logger.experiment.finish)


class AppendingCSVLogger(Logger):
    """Logger that writes metrics to one csv file, to which later starts of the run append.

    Lightning's csv logger deletes the file of an earlier start. Here the column `start` (0, 1, ...) tells from which
    start a row is. A run that was killed repeats the steps since its last checkpoint; if two rows have the same step
    and metric, the later start is the valid one. A log never ends a run: rows that cannot be written wait for the next
    time, and a damaged file is moved aside, both with a warning.

    Args:
        path: the csv file.
        flush_every: number of rows to collect before writing them; a kill loses at most that many.
    """

    def __init__(self, path: Path, flush_every: int = 20) -> None:
        super().__init__()
        self.path = Path(path)
        self.last_step: int | None = None
        self._flush_every = flush_every
        self._waiting: list[dict[str, Any]] = []
        self._flushed_at = time.monotonic()
        self._warned = False
        rows = self._read()
        self._columns = list(rows[0]) if rows else ["start", "step"]
        self._start = 1 + max((int(row["start"]) for row in rows), default=-1)

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def version(self) -> int:
        return self._start

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because config.yaml in the run's folder already has the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.last_step = step if step is not None else self.last_step
        values = {name: float(value) for name, value in metrics.items()}
        self._waiting.append({"start": self._start, "step": "" if step is None else step, **values})
        if len(self._waiting) >= self._flush_every or time.monotonic() - self._flushed_at > 10:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        self._flushed_at = time.monotonic()
        if not self._waiting:
            return
        try:
            self._write()
        except (OSError, DiskFull) as error:
            if not self._warned:
                log.warning("%s (%s): the log is not written now; the run continues", self.path, error)
            self._warned = True
        else:
            self._waiting = []

    def _write(self) -> None:
        """Write the waiting rows, all of them or none."""
        new = [key for key in dict.fromkeys(key for row in self._waiting for key in row) if key not in self._columns]
        text = io.StringIO(newline="")
        if new or not self.path.exists():
            rows: list[dict[str, Any]] = [*self._read(), *self._waiting]
            writer = csv.DictWriter(text, [*self._columns, *new], restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_aside(self.path, text.getvalue())
            self._columns += new
        else:
            csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(self._waiting)
            append(self.path, text.getvalue())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        try:
            written = self.path.read_text(encoding="utf-8")
            content = written[: written.rfind("\n") + 1]
            reader = csv.DictReader(io.StringIO(content), strict=True)
            if (reader.fieldnames or [])[:2] != ["start", "step"]:
                raise ValueError("its first line does not name the columns")
            rows = [{**row, "start": str(int(row["start"]))} for row in reader if None not in row]
        except (OSError, ValueError, TypeError, csv.Error) as error:
            aside = self.path.with_name(f"{self.path.stem}.damaged-{secrets.token_hex(2)}{self.path.suffix}")
            log.warning("%s is damaged (%s); it is moved to %s, and a new one begins", self.path, error, aside.name)
            os.replace(self.path, aside)
            return []
        if content != written:  # the process was killed while writing the last line, which is discarded
            write_aside(self.path, content)
        return rows


def _stored_id(folder: Path) -> str:
    """Return the id of the W&B run; a new one, which is stored, if there is none or if the file is damaged."""
    path = folder / "run_id"
    try:
        if re.fullmatch(r"[\w-]+", stored := path.read_text(encoding="ascii").strip()):
            return stored
        log.warning("%s is damaged, so W&B gets a new run", path)
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s is damaged (%s), so W&B gets a new run", path, error)
    new = secrets.token_hex(4)
    try:
        discard(path)
        write_aside(path, new)
    except (OSError, DiskFull) as error:
        log.warning("%s cannot be written (%s), so a resumed run will be another run of W&B", path, error)
    return new


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}/{key}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


def _plan_row(number: int, operation: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"order": number}
    for key, value in operation.items():
        if key == "masks":  # of narrow: their numbers of channels say more
            row["widths"] = _cell([int(mask, 16).bit_count() for mask in value])
            continue
        row[key] = _cell(value) if isinstance(value, (list, tuple)) else value
    return row


def _cell(values: Sequence[Any]) -> str:
    """Return numbers as one text, with nested lists in parentheses."""
    return " ".join(f"({_cell(value)})" if isinstance(value, (list, tuple)) else f"{value:.4g}" for value in values)
