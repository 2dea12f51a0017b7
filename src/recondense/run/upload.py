"""The upload of a run's export to the hub. Repeating the command retries a failed upload."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recondense.config.schema import ExportConfig
from recondense.errors import UserError
from recondense.export.push import push_folder
from recondense.files import Damaged, read_checked, write_checked
from recondense.progress import progress
from recondense.report.summary import add_upload
from recondense.run.run_folder import SUMMARY


def missing_upload(settings: ExportConfig, summary: Mapping[str, Any]) -> str | None:
    """Return the repository to which the export must still be uploaded, according to summary.json; None if none."""
    repository, artifacts = settings.push_to_hub, summary["artifacts"]
    return repository if "model" in artifacts and artifacts.get("hub") != repository else None


def upload(repository: str, folder: Path, summary: Mapping[str, Any], *, private: bool) -> None:
    """Upload the exported folder, then record this in summary.json.

    Args:
        repository: repository of the hub.
        folder: the run's folder.
        summary: content of summary.json.
        private: whether to create a new repository as private.
    """
    with progress(f"pushing to {repository}"):
        push_folder(folder / "model", repository, private)
    write_summary(folder, add_upload(summary, repository))


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json to a run's folder."""
    write_checked(folder / SUMMARY, summary, indent=1)


def read_summary(folder: Path) -> dict[str, Any]:
    """Read summary.json from a run's folder.

    Raises:
        UserError: it is damaged.
    """
    try:
        return read_checked(folder / SUMMARY)
    except Damaged as error:
        remedy = "Delete this file, and the same command makes it again; or use overwrite=true to start over"
        raise UserError(f"{folder / SUMMARY} is damaged: {error}. {remedy}") from None
