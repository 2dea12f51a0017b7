"""The files that a run reads, by the settings that name them, and what has become of them since the run began.

A file is hashed again only if its size or its time has changed, so copying or touching a folder is no change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recondense.files import hash_file
from recondense.models.model_files import cached_snapshot
from recondense.progress import progress
from recondense.run.resolved_run import Run
from recondense.run.run_folder import named_inputs

TASK_FILES = (".yaml", ".py", ".json", ".jsonl", ".csv", ".txt", ".parquet")
# The files of a model's folder that can change a result, an export or the tokenizer in it.
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "plan.json", "*.py"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "*.jinja"),
)
MODELS = ("model.path", "model.tokenizer", "teacher_path")  # ends of the names of settings
States = dict[str, list[Any]]  # size, time in ns and hash of each file, by its name within the input


@dataclass(frozen=True)
class Changes:
    """What has become of the inputs of a run.

    Args:
        changed: descriptions of the inputs that are not as they were.
        gone: descriptions of the inputs that are no longer there.
    """

    changed: Sequence[str]
    gone: Sequence[str]


def input_states(run: Run, known: Mapping[str, States]) -> dict[str, States]:
    """Return the states of all files that a run reads, by setting.

    Args:
        run: the run.
        known: earlier states, from which the hashes of unchanged files are taken.
    """
    with progress("hashing the files of the run"):
        return {name: file_states(files, known.get(name, {})) for name, files in _inputs(run) if files is not None}


def compare(run: Run, known: Mapping[str, States]) -> Changes:
    """Compare the files that a run reads with their earlier states. Settings without earlier states are left out."""
    changed, gone = [], []
    for name, files in _inputs(run):
        if name not in known:
            continue
        if files is None:
            gone.append(name)
        elif different := different_files(files, known[name]):
            changed.append(name if different == [""] else f"{name} ({', '.join(different)})")
    return Changes(changed, gone)


def file_states(files: Mapping[str, Path], known: Mapping[str, Sequence[Any]]) -> States:
    """Return the states of some files.

    Args:
        files: paths by name.
        known: earlier states, from which the hashes of unchanged files are taken.
    """
    states: States = {}
    for name, path in files.items():
        status = path.stat()
        size, time, digest = known.get(name, (None, None, ""))
        unchanged = (size, time) == (status.st_size, status.st_mtime_ns)
        states[name] = [status.st_size, status.st_mtime_ns, digest if unchanged else hash_file(path)]
    return states


def different_files(files: Mapping[str, Path], known: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return the names of the files that are missing, new or changed, in comparison with earlier states."""
    return sorted({*files, *known} - {name for name in files if name in known and _is_same(files[name], known[name])})


def _is_same(path: Path, state: Sequence[Any]) -> bool:
    size, time, digest = state
    try:
        status = path.stat()
        if status.st_size != size:
            return False
        return bool(status.st_mtime_ns == time or hash_file(path) == digest)
    except OSError:
        return False


def _inputs(run: Run) -> Iterator[tuple[str, dict[str, Path] | None]]:
    """Yield each input of a run: its setting with its value, and its files by name; None if it is not there.

    A hub model's files are those in the cache. The datasets of the hub are left out.
    """
    for setting, value in named_inputs(run):
        is_model, path = setting.endswith(MODELS), Path(value).expanduser()
        if is_model and not path.exists():
            revision = {"model.path": run.config.model.revision, "model.tokenizer": None}
            snapshot = cached_snapshot(value, revision.get(setting, run.config.recovery.teacher_revision))
            path = snapshot or path
        name = f"{setting}={value}"
        if setting == "cache_dir" or (not path.exists() and setting.endswith("dataset")):
            continue
        if not path.exists():
            yield name, None
        elif path.is_file():
            yield name, {"": path}
        else:
            select = model_files if is_model else deciding_files if setting.startswith("evaluation") else all_files
            yield name, {str(file.relative_to(path)): file for file in select(path)}


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model's folder that can change a result or an export."""
    return sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})


def deciding_files(folder: Path) -> list[Path]:
    """Return the files of a task folder that can change a result: tasks, functions and data, but no caches."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in TASK_FILES and path.is_file()]
    return [path for path in files if "cache" not in path.relative_to(folder).parts]


def all_files(folder: Path) -> list[Path]:
    """Return all files of a folder but hidden ones."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
