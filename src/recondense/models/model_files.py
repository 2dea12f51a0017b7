"""Find files of a model, local or on the hub, and read its history of earlier compressions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel

from recondense.config.schema import ModelConfig
from recondense.offline import hub_access
from recondense.plan import History

ATTRIBUTE = "_recondense_history"  # of a model that `load` has loaded


def model_file(path: str | Path, name: str, revision: str | None = None) -> Path | None:
    """Return the local path of a model's file; None if the model has no such file.

    If the model is a hub id, the file is downloaded. If the hub cannot be reached, only the cache is searched.

    Args:
        path: a folder or a hub id.
        name: the name of the file.
        revision: the revision on the hub; None for the main branch.
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
        except (OSError, HFValidationError):  # no such repository or revision: loading the model says so later
            return None
    return None if cached is None else Path(cached)


def cached_snapshot(repository: str, revision: str | None = None) -> Path | None:
    """Return the folder in the hub's cache with a repository's files; None if it is not there. The hub is not asked."""
    files = (cached_model_file(repository, name, revision) for name in ("config.json", "tokenizer_config.json"))
    return next((file.parent for file in files if file is not None), None)


def cached_model_file(path: str | Path, name: str, revision: str | None = None) -> Path | None:
    """Return the local path of a model's file as `model_file` does, but without downloading it."""
    if Path(path).is_dir():
        return model_file(path, name)
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(str(path), name, revision=revision)
    except HFValidationError:  # neither a folder nor a hub id
        return None
    return Path(cached) if isinstance(cached, str) else None


def read_history(model: ModelConfig) -> History:
    """Return the earlier compressions of the model that a run starts from; empty without a plan.json beside it."""
    plan = None if model.path is None else model_file(model.path, "plan.json", model.revision)
    return History.load(None if plan is None else plan.parent)


def keep_history(model: PreTrainedModel, settings: ModelConfig) -> None:
    """Keep the history of a model with it. An export may replace the folder that the model was loaded from."""
    model.__dict__[ATTRIBUTE] = read_history(settings)


def history_of(model: PreTrainedModel) -> History:
    """Return the compressions that made a model before it was loaded, by `load` or by transformers."""
    if ATTRIBUTE not in model.__dict__:
        keep_history(model, ModelConfig(path=model.config.name_or_path or None))
    history: History = model.__dict__[ATTRIBUTE]
    return history
