"""Compare the runs of a Hydra sweep: a table, CSV and JSON files and a picture in the sweep's folder."""

from __future__ import annotations

import csv
import io
import json
import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from recondense.config import schema
from recondense.files import write_aside
from recondense.report.comparison import by_seed, comparison_markdown, comparison_table
from recondense.report.comparison_columns import comparison_values
from recondense.report.sweep_table import sweep_row, sweep_table
from recondense.report.tables import print_tables
from recondense.run.exit_codes import JobFailed, refuse
from recondense.run.search_path import as_written
from recondense.run.sweeping import named_in_sweep

log = logging.getLogger(__name__)

RECORDS = ".jobs"  # one file per job, written by the process that ran it, which may not be this one


class SweepComparison(Callback):
    """Collect the `summary.json` of each run of a sweep (`-m`) into comparison.csv, comparison.json and comparison.png.

    Several seeds of the same settings are one line of the table, which is then also written as comparison.md.

    The files are updated after every job; the table is printed at the end and after a failure. Only settings in which
    the runs differ are shown. A run without a summary is listed with the reason.

    A job that fails with an error that the user can fix counts as one that returned None: the sweep continues, the
    error is printed when the job fails and again at the end, and the process exits with code 2.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        shutil.rmtree(_folder(config) / RECORDS, ignore_errors=True)  # from an earlier sweep in this folder

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        failed = job_return.status != JobStatus.COMPLETED
        error = job_return._return_value if failed else None
        problems = list(error.messages) if isinstance(error, JobFailed) else []
        what = " ".join(problems) or f"{type(error).__name__}: {error}".partition("\n")[0]
        values = cast(dict[str, Any], OmegaConf.to_container(job_return.cfg, resolve=True))
        record = {
            "number": int(config.hydra.job.num),
            "overrides": list(job_return.overrides or ()),
            "run_folder": str(schema.from_dict(values).run_folder()),
            "status": f"failed: {what}" if failed else "done",
            "problems": problems,
        }
        write_aside(_folder(config) / RECORDS / f"{record['number']:06d}.json", json.dumps(record))
        # After every job: if one has failed, Hydra runs the others and then exits without calling `on_multirun_end`.
        _compare(_folder(config), show=failed and not problems)
        if problems:
            print(f"recondense: job {record['number']} of the sweep failed: {what}", file=sys.stderr, flush=True)
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        records, given = _records(_folder(config)), _names_with_several_values(config)
        log_sweep(config, _compare(_folder(config), show=True, given=given))
        shutil.rmtree(_folder(config) / RECORDS, ignore_errors=True)
        messages = [
            f"{', '.join(f'{key}={value}' for key, value in settings.items())}: {problem}"
            for record, settings in zip(records, swept_settings(records, given), strict=True)
            for problem in record["problems"]
        ]
        if messages:
            refuse(messages)
        if any(record["status"] != "done" for record in records):  # some sweepers, such as Optuna's, survive a crash
            sys.exit(1)


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / RECORDS).glob("*.json"))]


def _compare(folder: Path, *, show: bool, given: Sequence[str] = ()) -> list[dict[str, Any]]:
    records = _records(folder)
    if not records:
        return []
    rows = comparison_rows(records, given)
    write_comparison(rows, folder)
    if show:
        print_tables([comparison_table(by_seed(rows)) if _seeded(rows) else sweep_table(rows)])
        print(f"comparison.csv, comparison.json and the picture are in {folder}")
    return rows


def log_sweep(config: DictConfig, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log the table and the picture as one W&B run, if the runs of the sweep are logged to W&B."""
    if "logger" not in config or config.get("plan_only") or not any(row["status"] == "done" for row in rows):
        return
    from recondense.report import tracking  # late: they import Lightning
    from recondense.report.wandb_run import Names, QuietWandbLogger

    values = cast(dict[str, Any], OmegaConf.to_container(config.logger, resolve=True))
    folder = _folder(config)
    logger_config = replace(schema.from_dict({"logger": values}).logger, csv=False)
    named = named_in_sweep(logger_config, config.experiment_name, folder, "comparison")
    methods = dict.fromkeys(str(row["method"]) for row in rows if "method" in row)
    names = Names(f"{config.experiment_name}-{folder.name}", "comparison", list(methods))
    sweep = {"sweep": [row["settings"] for row in rows]}
    loggers = tracking.make_loggers(named, folder, sweep, names)
    columns, data = comparison_values(by_seed(rows))
    for logger in loggers:
        if isinstance(logger, QuietWandbLogger):
            logger.attempt(logger.log_table, "comparison/table", columns=columns, data=data)
            if (folder / "comparison.png").exists():
                logger.attempt(logger.log_image, "comparison/picture", [str(folder / "comparison.png")])
    tracking.finish_loggers(loggers)


def comparison_rows(records: Sequence[Mapping[str, Any]], given: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return one row per job, with its swept settings and its results.

    Args:
        records: one per job, with `number`, `overrides` ("key=value" strings), `run_folder` and `status`.
        given: names of the settings to which the command gives several values.
    """
    rows = []
    for record, settings in zip(records, swept_settings(records, given), strict=True):
        row: dict[str, Any] = {"settings": settings, "status": record["status"], "run_folder": record["run_folder"]}
        try:
            text = Path(record["run_folder"], "summary.json").read_text(encoding="utf-8")
            # The folder of a failed job may contain the summary of an earlier, complete run.
            if record["status"] == "done":
                row.update(sweep_row(json.loads(text)))
        except (OSError, json.JSONDecodeError):
            row["status"] = row["status"] if row["status"] != "done" else "failed: no summary"
        rows.append(row)
    return rows


def swept_settings(records: Sequence[Mapping[str, Any]], given: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return for each job the overrides in which the jobs differ.

    If they do not differ, these are the settings that the command gives several values, or else the runs' names.

    Args:
        records, given: as for `comparison_rows`.
    """
    jobs = [dict(_split(override) for override in record["overrides"]) for record in records]
    keys = list(dict.fromkeys(key for settings in jobs for key in settings))
    differing = [key for key in keys if len({settings.get(key) for settings in jobs}) > 1]
    if shown := differing or [key for key in keys if key in given]:
        return [{key: settings[key] for key in shown if key in settings} for settings in jobs]
    return [{"run": Path(record["run_folder"]).name} for record in records]


def _names_with_several_values(config: DictConfig) -> list[str]:
    """Return the names of the settings to which the command of a sweep gives several values."""
    parser = OverridesParser.create()
    overrides = map(parser.parse_override, as_written(OmegaConf.select(config, "hydra.overrides.task")))
    names = [override.get_key_element() for override in overrides if override.is_sweep_override()]
    return [name.lstrip("+~") for name in (*names, *(OmegaConf.select(config, "hydra.sweeper.params") or ()))]


def write_comparison(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write comparison.json, comparison.csv and, if any run has a size and a perplexity, comparison.png.

    If there are several seeds, also write comparison.md.
    """
    from recondense.report.sweep_picture import draw_comparison, draw_sweep  # late: it imports Matplotlib

    write_aside(folder / "comparison.json", json.dumps(list(rows), indent=1) + "\n")
    flat = [{**row["settings"], **{key: value for key, value in row.items() if key != "settings"}} for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_aside(folder / "comparison.csv", text.getvalue())
    if _seeded(rows):
        entries = by_seed(rows)
        write_aside(folder / "comparison.md", comparison_markdown(entries))
        if draw_comparison(entries, folder / "comparison.png") is not None:
            return
    draw_sweep(rows, folder / "comparison.png")


def _seeded(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the sweep varies the seed and something else."""
    return any("seed" in row["settings"] and len(row["settings"]) > 1 for row in rows)


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def _folder(config: DictConfig) -> Path:
    return Path(str(config.hydra.sweep.dir))
