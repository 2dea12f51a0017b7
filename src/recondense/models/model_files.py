"""Files of a model folder, local or on the hub; its history of earlier compressions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recondense.config.schema import ModelConfig
from recondense.offline import hub_access
from recondense.plan import History


def model_file(path: str | Path, name: str, revision: str | None = None) -> Path | None:
    """The path of a model's file, downloaded if the model is a hub id; None if the model has no such file.

    If the hub cannot be reached, only the cache is searched.
    """
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    from transformers.utils import cached_file

    answers: Any = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
    quiet = {f"_raise_exceptions_for_{what}": raises for what, raises in answers.items()}
    with hub_access() as online:
        try:
            cached = cached_file(str(path), name, revision=revision, local_files_only=not online, **quiet)
        except OSError:  # no such repository or revision: loading it raises the error
            return None
    return None if cached is None else Path(cached)


def read_history(model: ModelConfig) -> History:
    """The compressions that made the model a run starts from; empty without a plan.json beside it."""
    plan = None if model.path is None else model_file(model.path, "plan.json", model.revision)
    return History.load(None if plan is None else plan.parent)
