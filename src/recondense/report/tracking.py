"""Loggers of a run: one csv file that grows over restarts, and Weights & Biases that never gets in the way."""

from __future__ import annotations

import csv
import io
import logging
import netrc
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from recondense.config.schema import LoggerConfig, WandbConfig
from recondense.files import write_aside

log = logging.getLogger(__name__)


def make_loggers(
    settings: LoggerConfig,
    run_folder: Path,
    resolved_config: Mapping[str, Any],
    *,
    run_id: str | None = None,
    job_type: str | None = None,
) -> list[Logger]:
    """The loggers that the settings ask for, with all their files below `run_folder/logs`.

    Args:
        settings: csv on or off; mode, project, entity, name and tags of W&B.
        run_folder: the run's folder. It also keeps the id of the W&B run, so a resumed run logs to the same one.
        resolved_config: plain containers; becomes the config of the W&B run.
        run_id: id of the W&B run, instead of the kept one; and its job_type.

    Returns:
        csv first. W&B is left out when it is disabled or does not start; that is a warning, not an error.
    """
    folder = Path(run_folder) / "logs"
    loggers: list[Logger] = []
    if settings.csv:
        loggers.append(AppendingCSVLogger(folder / "metrics.csv"))
    mode = wandb_mode(settings.wandb.mode)
    if mode != "disabled" and _is_first_rank():
        names = {"id": run_id or _kept_id(folder), "job_type": job_type}
        loggers += _start_wandb(settings.wandb, mode, folder, resolved_config, names)
    return loggers


def wandb_mode(mode: str) -> str:
    """`online`, `offline` or `disabled`: what was asked for, as far as it goes without a prompt.

    `auto` follows the variable WANDB_MODE, else is online with a login (WANDB_API_KEY or netrc) and offline without.
    """
    if mode == "auto":
        variable = os.environ.get("WANDB_MODE", "").lower()
        mode = {"dryrun": "offline", "offline": "offline", "disabled": "disabled"}.get(variable, "")
        return mode or ("online" if _has_login() else "offline")
    if mode == "online" and not _has_login():
        log.warning("W&B: no login (WANDB_API_KEY or `wandb login`), so this run is logged offline")
        return "offline"
    return mode


def log_summary(loggers: Sequence[Logger], summary: Mapping[str, Any]) -> None:
    """Hand the figures of a run to its loggers: summary metrics in W&B, one last row in the csv file."""
    metrics = flatten_summary(summary)
    for logger in loggers:
        if isinstance(logger, QuietWandbLogger):
            logger.attempt(logger.experiment.summary.update, metrics)
        elif isinstance(logger, AppendingCSVLogger):
            logger.log_metrics(metrics, logger.last_step)
            logger.save()


def flatten_summary(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `summary.json` under fixed names.

    `original/perplexity`, `compressed/<task>/<metric>`, `recovered/decode_tokens_per_second`, `ratios/memory`,
    `parameters/routed_experts/compressed`, `refit/<layer>/error_after`, `seconds/search`. What is not known is absent.
    """
    metrics: dict[str, float] = {}
    for stage, values in summary.get("stages", {}).items():
        for key, value in values.items():
            # Tasks and profile are levels of the file, not of a metric's name.
            metrics.update(_numbers(value, stage if key in ("tasks", "profile") else f"{stage}/{key}"))
    for section in ("ratios", "parameters", "bytes_on_disk", "refit", "seconds"):
        metrics.update(_numbers(summary.get(section, {}), section))
    return metrics


def log_plan(loggers: Sequence[Logger], plan: Mapping[str, Any], picture: Path | None) -> None:
    """Log a plan to W&B as a table (one row an operation) and as a picture. The csv file has no place for either."""
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
    """Note in the W&B run where the exported model is."""
    for logger in loggers:
        if isinstance(logger, QuietWandbLogger):
            logger.attempt(logger.experiment.summary.update, {"artifacts/model": str(folder)})


def finish_loggers(loggers: Sequence[Logger]) -> None:
    """Write what is left and close the W&B run, so that the next run of a sweep starts its own."""
    for logger in loggers:
        logger.save()
        if isinstance(logger, QuietWandbLogger):
            logger.attempt(logger.experiment.finish)


class AppendingCSVLogger(Logger):
    """Metrics in one csv file that later starts of the run add to.

    Lightning's own csv logger deletes the file of an earlier start. Here every row says which `start` it is from (0, 1,
    ...): a run that was killed repeats the steps since its last checkpoint, and of two rows with one step and metric
    the later start counts.

    Args:
        path: the csv file.
        flush_every: rows that may be lost by a kill.
    """

    def __init__(self, path: Path, flush_every: int = 20) -> None:
        super().__init__()
        self.path = Path(path)
        self.last_step: int | None = None
        self._flush_every = flush_every
        self._waiting: list[dict[str, Any]] = []
        self._flushed_at = time.monotonic()
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
        """Nothing: the run's folder has config.yaml."""

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
        new = [key for key in dict.fromkeys(key for row in self._waiting for key in row) if key not in self._columns]
        text = io.StringIO(newline="")
        if new or not self.path.exists():
            rows: list[dict[str, Any]] = [*self._read(), *self._waiting]
            self._columns += new
            writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_aside(self.path, text.getvalue())
        else:
            csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(self._waiting)
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(text.getvalue())
        self._waiting = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        content = self.path.read_text(encoding="utf-8")
        if not content.endswith("\n"):  # killed while adding a line: that line does not count
            content = content[: content.rfind("\n") + 1]
            write_aside(self.path, content)
        return list(csv.DictReader(io.StringIO(content)))


class QuietWandbLogger(WandbLogger):
    """Lightning's W&B logger, except that an error of W&B is a warning, once, and ends the logging, not the run."""

    broken = False

    def attempt(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Do something with W&B, unless it has failed before."""
        if self.broken or not _is_first_rank():
            return
        try:
            action(*args, **kwargs)
        except Exception as error:
            self.broken = True
            log.warning("W&B: logging stopped (%s: %s); the run continues", type(error).__name__, error)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.attempt(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved config is the config of the W&B run."""


def _start_wandb(
    settings: WandbConfig, mode: str, folder: Path, resolved_config: Mapping[str, Any], names: Mapping[str, Any]
) -> list[QuietWandbLogger]:
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            import wandb

            folder.mkdir(parents=True, exist_ok=True)
            run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name,
                tags=list(settings.tags) or None,
                dir=str(folder),
                **names,
                # Offline there is nothing to resume from: the next start of this id is joined to it by `wandb sync`.
                resume="allow" if attempt == "online" else None,
                mode=attempt,  # type: ignore[arg-type]
                config=dict(resolved_config),
                reinit="create_new",  # neither take over nor end a run that someone else has open in this process
                save_code=False,
                settings=wandb.Settings(silent=True, console="off", init_timeout=60),
            )
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        except Exception as error:
            log.warning("W&B: could not start %s (%s: %s)", attempt, type(error).__name__, error)
            continue
        if attempt == "online":
            log.info("W&B: %s", run.url)
        return [QuietWandbLogger(experiment=run, save_dir=str(folder), project=settings.project, id=names["id"])]
    return []


def _kept_id(folder: Path) -> str:
    path = folder / "run_id"
    if not path.exists():
        write_aside(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()


def _has_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "api.wandb.ai"
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        try:
            if host in netrc.netrc(os.path.expanduser(candidate)).hosts:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _is_first_rank() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}/{key}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


def _plan_row(number: int, operation: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"order": number}
    for key, value in operation.items():
        row[key] = _cell(value) if isinstance(value, (list, tuple)) else value
    return row


def _cell(values: Sequence[Any]) -> str:
    """Numbers as one text, lists within in brackets."""
    return " ".join(f"({_cell(value)})" if isinstance(value, (list, tuple)) else f"{value:.4g}" for value in values)
