"""The files by which the folder of a run is recognized, and runs inside folders that are about to be deleted."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

CONFIG, INPUTS, SUMMARY = "config.yaml", "inputs.json", "summary.json"


def run_inside(places: Iterable[Path]) -> Path | None:
    """Return the folder of a run that is one of these folders or inside one; None if there is none.

    Links are not followed, because deleting a folder deletes only the links in it. A single file of these names can
    belong to another program, such as the config.yaml that wandb writes; two of them are a run.

    Args:
        places: folders, or files, which contain nothing.
    """
    for place in places:
        for folder, _, files in os.walk(place) if not place.is_symlink() else ():
            if is_run(files):
                return Path(folder)
    return None


def is_run(files: Iterable[str]) -> bool:
    """Return whether a folder with files of these names is that of a run."""
    return len({CONFIG, INPUTS, SUMMARY}.intersection(files)) >= 2
