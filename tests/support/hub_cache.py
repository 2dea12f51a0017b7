"""A folder in the cache of huggingface_hub, as if it had been downloaded."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path


def in_hub_cache(cache: Path, folder: Path, repository: str, revision: str = "main") -> None:
    """Copy the folder into the cache as a download of the repository owner/name.

    Args:
        cache: huggingface_hub's `HF_HUB_CACHE`.
        revision: a branch.
    """
    stored = cache / f"models--{repository.replace('/', '--')}"
    commit = hashlib.sha1(revision.encode()).hexdigest()
    shutil.copytree(folder, stored / "snapshots" / commit)
    (stored / "refs").mkdir(exist_ok=True)
    (stored / "refs" / revision).write_text(commit)
