"""Files of a model folder, local or on the hub: which one, and what was done to the model before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recondense.config.schema import ModelConfig
from recondense.offline import reachable_or_offline
from recondense.plan import History


def model_file(path: str | Path, name: str, revision: str | None = None) -> Path | None:
    """A file of a model: in its folder, or of a hub id from the hub or its cache; None if it has none.

    Nothing is asked of a hub that is out of reach.
    """
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    from transformers.utils import cached_file

    answers: Any = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
    quiet = {f"_raise_exceptions_for_{what}": raises for what, raises in answers.items()}
    with reachable_or_offline() as online:
        try:
            cached = cached_file(str(path), name, revision=revision, local_files_only=not online, **quiet)
        except OSError:  # no such repository or revision: whoever loads it says so
            return None
    return None if cached is None else Path(cached)


def history_of(model: ModelConfig) -> History:
    """What was done to the model that a run starts from; nothing of one that has no plan, or was trained here."""
    plan = None if model.path is None else model_file(model.path, "plan.json", model.revision)
    return History.of_folder(None if plan is None else plan.parent)
