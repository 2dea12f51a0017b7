"""A disk without room is one sentence, however a library words it; any other error keeps its type."""

from __future__ import annotations

import errno
import resource
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from recondense import files, full_disk
from recondense.errors import UserError
from recondense.full_disk import DiskFull, explain_full_disks, explain_writing, lacks_room


def _raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    error.__cause__ = cause
    return error


FULL: list[BaseException] = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EFBIG, "File too large"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[Errno 28] Error writing to file: IOError"),
    sqlite3.OperationalError("database or disk is full"),
    _raised(RuntimeError("unexpected pos 64 vs 0"), OSError(errno.ENOSPC, "No space left on device")),
    _raised(Exception("while building the dataset"), _raised(ValueError("x"), OSError(errno.EDQUOT, "quota"))),
]
OTHERS: list[BaseException] = [
    OSError(errno.EACCES, "Permission denied"),
    RuntimeError("the width 28 is not supported"),
    KeyError("full"),
    UserError("batch too large"),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_an_error_for_want_of_room_is_a_sentence(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DiskFull) as sentence, explain_writing(tmp_path / "file", 1500):
        raise error
    text = str(sentence.value)
    assert text.startswith(f"{tmp_path / 'file'} cannot be written: ") and "it needs 1.50 kB" in text
    assert "are free" in text and "the same command then goes on" in text and "\n" not in text
    places, match = {"run_dir": tmp_path / "not made yet"}, r"Free are run_dir .*, temporary files"
    with pytest.raises(DiskFull, match=match) as sentence, explain_full_disks(places):
        raise error
    with pytest.raises(DiskFull) as same, explain_full_disks({}):
        raise sentence.value
    assert same.value is sentence.value


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_another_error_is_not_touched(tmp_path: Path, error: Exception) -> None:
    for context in (explain_writing(tmp_path / "file"), explain_full_disks({"run_dir": tmp_path})):
        with pytest.raises(type(error)) as same, context:
            raise error
        assert same.value is error
    assert lacks_room(error) is None and lacks_room(None) is None


def _torch_save(path: Path) -> None:
    with files.replace_file(path) as aside, aside.open("wb") as file:
        torch.save({"a": torch.zeros(50_000)}, file)


def _save_tensors(path: Path) -> None:
    with files.replace_file(path) as aside:
        save_file({"a": torch.zeros(50_000)}, aside)


def _save_folder(path: Path) -> None:
    with files.replace_folder(path, 200_000) as aside:
        save_file({"a": torch.zeros(50_000)}, aside / "model.safetensors")


def _append(path: Path) -> None:
    path.write_text("first\n")
    files.append(path, "x" * 200_000)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: files.write_aside(path, "x" * 200_000),
    "json": lambda path: files.write_checked(path, {"a": "x" * 200_000}),
    "entry of a cache": lambda path: files.JsonFolder(path).__setitem__("a", {"a": "x" * 200_000}),
    "torch": _torch_save,
    "safetensors": _save_tensors,
    "folder": _save_folder,
    "log": _append,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_everything_that_writes_files_says_so_and_leaves_nothing(tmp_path: Path, writer: str) -> None:
    """With a real limit of the size of files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(DiskFull, match=r"cannot be written: the file would be larger than this system allows"):
            WRITERS[writer](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    rest = [other for other in path.parent.rglob("*") if other.is_file()]
    assert [other.read_text() for other in rest] == (["first\n"] if writer == "log" else [])


def test_little_room_is_told_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines: list[str] = []
    monkeypatch.setattr(full_disk.log, "warning", lambda text, *parts: lines.append(text % parts))
    full_disk.warn_of_little_room(tmp_path, 1, "the export")
    assert lines == []
    full_disk.warn_of_little_room(tmp_path / "a" / "b", 10**18, "the export")
    assert "the export needs about 1.00e+06 TB" in lines[0]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345_678, "12.3 MB"), (999_600, "1.00 MB"), (28.6e9, "28.6 GB")],
)
def test_sizes_have_units(size: float, text: str) -> None:
    assert full_disk.format_bytes(size) == text
