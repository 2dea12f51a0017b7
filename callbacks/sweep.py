"""A comparison of the runs of a Hydra sweep: table, csv, json and a picture in the sweep's folder."""

from __future__ import annotations

import csv
import io
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from recondense import config as schema
from recondense.pictures import sweep_picture
from recondense.plan import write_aside
from recondense.report import print_tables, sweep_row, sweep_table

log = logging.getLogger(__name__)

RECORDS = ".jobs"  # one file a job, written by the process that ran it, which need not be this one


class SweepComparison(Callback):
    """After `-m`: collect each run's `summary.json` into comparison.csv, comparison.json and comparison.png.

    The files grow with every job that ends; the table is printed at the end, and after a failure. Of the settings only
    those are shown in which the runs differ. A run without a summary is listed with what happened.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        shutil.rmtree(_folder(config) / RECORDS, ignore_errors=True)  # of an earlier sweep in this folder

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        failed = job_return.status != JobStatus.COMPLETED
        error = job_return._return_value if failed else None
        values = cast(dict[str, Any], OmegaConf.to_container(job_return.cfg, resolve=True))
        record = {
            "number": int(config.hydra.job.num),
            "overrides": list(job_return.overrides or ()),
            "run_folder": str(schema.from_dict(values).run_folder()),
            "status": f"failed: {type(error).__name__}: {error}".splitlines()[0] if failed else "done",
        }
        write_aside(_folder(config) / RECORDS / f"{record['number']:06d}.json", json.dumps(record))
        # Now, not only at the end: when some job failed, Hydra runs the others and then leaves without calling the end.
        _compare(_folder(config), show=failed)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        _compare(_folder(config), show=True)
        shutil.rmtree(_folder(config) / RECORDS, ignore_errors=True)


def _compare(folder: Path, *, show: bool) -> None:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / RECORDS).glob("*.json"))]
    if not records:
        return
    rows = comparison_rows(records)
    write_comparison(rows, folder)
    if show:
        print_tables([sweep_table(rows)])
        print(f"comparison.csv, comparison.json and the picture are in {folder}")


def comparison_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a job: what was swept, what came of it.

    Args:
        records: `number`, `overrides` ("key=value" each), `run_folder`, `status`.
    """
    rows = []
    for record, settings in zip(records, swept_settings([record["overrides"] for record in records]), strict=True):
        row: dict[str, Any] = {"settings": settings, "status": record["status"], "run_folder": record["run_folder"]}
        try:
            text = Path(record["run_folder"], "summary.json").read_text(encoding="utf-8")
            # A failed job may find the summary of an earlier, complete run: that is not its own.
            if record["status"] == "done":
                row.update(sweep_row(json.loads(text)))
        except (OSError, json.JSONDecodeError):
            row["status"] = row["status"] if row["status"] != "done" else "failed: no summary"
        rows.append(row)
    return rows


def swept_settings(overrides: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """The overrides in which jobs differ; all of them when there is no difference (a sweep of one job)."""
    found = [dict(_split(override) for override in one) for one in overrides]
    keys = list(dict.fromkeys(key for settings in found for key in settings))
    differing = [key for key in keys if len({settings.get(key) for settings in found}) > 1] or keys
    return [{key: settings[key] for key in differing if key in settings} for settings in found]


def write_comparison(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the three files; the picture only when some run has a size and a perplexity."""
    write_aside(folder / "comparison.json", json.dumps(list(rows), indent=1) + "\n")
    flat = [{**row["settings"], **{key: value for key, value in row.items() if key != "settings"}} for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_aside(folder / "comparison.csv", text.getvalue())
    sweep_picture(rows, folder / "comparison.png")


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def _folder(config: DictConfig) -> Path:
    return Path(str(config.hydra.sweep.dir))
