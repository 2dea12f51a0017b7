"""Files of tensors that are damaged count as missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recondense.models.checked_tensors import is_intact, save_checked
from recondense.models.tensor_store import Disk, DiskTensorList

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "empty": torch.zeros(0)}
DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one byte": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x77"),
    "another file": lambda path: save_file({"a": torch.zeros(2)}, path),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "x").touch()),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_removed(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "file"
    assert not is_intact(path)
    save_checked(TENSORS, path, {"note": "x"})
    assert is_intact(path) and load_file(path).keys() == TENSORS.keys()
    DAMAGES[damage](path)
    assert not is_intact(path)
    assert not path.exists() and not path.is_symlink()
    save_checked(TENSORS, path)
    assert is_intact(path)


@pytest.mark.parametrize("suffix", [".bin", ".json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_list_is_empty_again(tmp_path: Path, damage: str, suffix: str) -> None:
    def open_list() -> DiskTensorList:
        tensors = Disk(tmp_path).tensor_list("states")
        assert isinstance(tensors, DiskTensorList)
        return tensors

    def fill() -> None:
        tensors = open_list()
        assert not tensors.finished and len(tensors) == 0
        tensors.append(torch.arange(5.0))
        tensors.finish()

    fill()
    assert open_list().finished and open_list()[0].tolist() == [0, 1, 2, 3, 4]
    DAMAGES[damage](tmp_path / f"states{suffix}")
    fill()
    assert open_list()[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("suffix", [".bin", ".json"])
def test_a_list_without_one_of_its_files_is_empty_again(tmp_path: Path, suffix: str) -> None:
    tensors = Disk(tmp_path).tensor_list("states")
    tensors.append(torch.zeros(2))
    tensors.finish()  # type: ignore[attr-defined]
    (tmp_path / f"states{suffix}").unlink()
    assert len(Disk(tmp_path).tensor_list("states")) == 0
