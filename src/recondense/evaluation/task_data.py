"""What is wrong with the data of an lm-eval task: a split that is not there, or text that is not valid Unicode."""

from __future__ import annotations

import glob
import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recondense.data.file_formats import bad_byte
from recondense.data.valid_text import repair
from recondense.errors import UserError

SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
PAIR = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..")  # the two halves of a character, in JSON
HALF = re.compile(r"\\u([dD][89a-fA-F]..)")
SURROGATE = re.compile("[\ud800-\udfff]")


def missing_split(error: KeyError) -> str:
    """Return the sentence about a split that the dataset of a task does not have; empty for any other error."""
    key = error.args[0] if error.args else None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        task = frame.f_locals.get("self")
        dataset, config = getattr(task, "dataset", None), getattr(task, "config", None)
        if not isinstance(dataset, Mapping) or key in dataset:
            continue
        if settings := [name for name in SPLITS if getattr(config, name, None) == key]:
            name = getattr(config, "dataset_path", None) or "of the task"
            there = ", ".join(map(str, dataset))
            return f"{settings[0]} is {key!r}, but the dataset {name} has no such split. Its splits: {there}"
    return ""


def invalid_text(settings: Mapping[str, Any]) -> str:
    """Return the first file of a task's data that is not valid Unicode, and why; empty if there is none."""
    data_files = (settings.get("dataset_kwargs") or {}).get("data_files")
    for path in (Path(name) for pattern in _names(data_files) for name in sorted(glob.glob(pattern))):
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if half := _half(line):
                        return f"{path}, line {number}: {half}"
        except UnicodeDecodeError:
            return f"{path} {bad_byte(path)}".rstrip(".")
        except OSError:
            continue
    return ""


def _names(data_files: Any) -> Iterator[str]:
    if isinstance(data_files, str):
        yield data_files
    elif isinstance(data_files, Mapping | list | tuple):
        for value in data_files.values() if isinstance(data_files, Mapping) else data_files:
            yield from _names(value)


def check_unicode(task: Any, name: str) -> None:
    """Check the texts of a task's requests, which no tokenizer takes if they are not valid Unicode.

    Raises:
        UserError: the text of a document has half of a character.
    """
    for instance in task.instances:
        for text in (text for text in instance.args if isinstance(text, str)):
            if repair(text) is not text and (half := SURROGATE.search(text)):
                reason = _not_unicode(f"{ord(half[0]):04x}")
                raise UserError(f"evaluation.tasks: {name}: document {instance.doc_id}: {reason}.")


def _half(line: str) -> str:
    """Return what is wrong with a line of JSON that has half of a character; empty if it has none."""
    half = HALF.search(PAIR.sub("", line.replace("\\\\", ""))) if "\\u" in line else None
    return _not_unicode(half[1]) if half else ""


def _not_unicode(code: str) -> str:
    return f"the text is not valid Unicode, because \\u{code} alone is half of a character"
