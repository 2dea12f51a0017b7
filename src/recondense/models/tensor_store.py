"""Lists of tensors that are written once and read many times, in memory or on disk."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from recondense.files import Damaged, discard, file_name, hash_file, read_checked, write_checked

log = logging.getLogger(__name__)


class TensorList(Protocol):
    """A list of tensors: a Python list, or a `DiskTensorList`."""

    def append(self, tensor: Tensor, /) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def __getitem__(self, index: int, /) -> Tensor: ...

    def __setitem__(self, index: int, tensor: Tensor, /) -> None: ...


class Storage(Protocol):
    """Makes tensor lists in memory or on disk."""

    def tensor_list(self, name: str | None = None) -> TensorList:
        """Return an empty list, or the finished list of this name."""
        ...


class Memory:
    """Keeps tensors in memory, without copying them."""

    def tensor_list(self, name: str | None = None) -> TensorList:
        return []


class Disk:
    """Keeps tensors in files in a folder.

    Args:
        folder: the folder; it is created if it does not exist.
        dtype: the dtype in which named lists store floating-point tensors; None stores them unchanged.
        device: the device to which tensors are read.
        keeps: whether the files of named lists stay, for later runs.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        keeps: bool = True,
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.device = torch.device(device)
        self.keeps = keeps
        folder.mkdir(parents=True, exist_ok=True)

    def tensor_list(self, name: str | None = None) -> TensorList:
        if name is not None and not self.keeps:
            return DiskTensorList(tempfile.TemporaryFile(dir=self.folder), None, self.dtype, self.device)
        if name is None:
            return DiskTensorList(tempfile.TemporaryFile(dir=self.folder), device=self.device)
        return DiskTensorList.at(self.folder / file_name(name), self.dtype, self.device)


class DiskTensorList:
    """A list of tensors in a file. Reading maps the file, copies one tensor and unmaps the file.

    Args:
        file: a file, open for reading and writing; a temporary file is deleted together with the list.
        path: the path of a file that stays, without suffix; None for a temporary file.
        dtype: the dtype in which floating-point tensors are stored; they are read in their original dtype.
        device: the device to which tensors are read.
    """

    def __init__(
        self,
        file: IO[bytes],
        path: Path | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._file = file
        weakref.finalize(self, file.close)
        self._path = path
        self._dtype = dtype
        self._device = device
        self._entries: list[dict[str, Any]] = []

    @classmethod
    def at(cls, path: Path, dtype: torch.dtype | None, device: torch.device | str) -> DiskTensorList:
        """Return the finished list at a path, or an empty list that will be written there."""
        index, content = path.with_suffix(".json"), path.with_suffix(".bin")
        entries = _finished_entries(index, content)
        if entries is None:
            for file in (index, content):
                discard(file)
            return cls(content.open("w+b"), path, dtype, device)
        finished = cls(content.open("rb"), path, dtype, device)
        finished._entries = entries
        return finished

    @property
    def named(self) -> bool:
        """Whether the file stays after the list is gone."""
        return self._path is not None

    @property
    def finished(self) -> bool:
        """Whether the file is complete."""
        return self._path is not None and self._path.with_suffix(".json").exists()

    def start_anew(self) -> None:
        """Empty a finished list, so that it can be filled again."""
        assert self._path is not None
        self._path.with_suffix(".json").unlink()
        self._file = self._path.with_suffix(".bin").open("w+b")
        weakref.finalize(self, self._file.close)
        self._entries = []

    def finish(self) -> None:
        """Mark the file as complete."""
        assert self._path is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        checksum = hash_file(self._path.with_suffix(".bin"))
        write_checked(self._path.with_suffix(".json"), {"entries": self._entries, "content": checksum})

    @property
    def nbytes(self) -> int:
        return sum(self._size(entry) for entry in self._entries)

    def append(self, tensor: Tensor, /) -> None:
        kept = self._kept(tensor)
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(_bytes(kept))
        entry = {"offset": offset, "shape": list(kept.shape), "kept": _name(kept.dtype), "dtype": _name(tensor.dtype)}
        self._entries.append(entry)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int, /) -> Tensor:
        entry = self._entries[index]
        self._file.flush()
        size = self._size(entry)
        flat = torch.empty(0, dtype=torch.uint8)
        if size:
            mapped = np.memmap(self._file, dtype=np.uint8, mode="r", offset=entry["offset"], shape=(size,))
            flat = torch.from_numpy(np.array(mapped))
        tensor = flat.view(getattr(torch, entry["kept"])).view(entry["shape"])
        return tensor.to(self._device, getattr(torch, entry["dtype"]))

    def __setitem__(self, index: int, tensor: Tensor, /) -> None:
        entry = self._entries[index]
        kept = self._kept(tensor)
        assert list(kept.shape) == entry["shape"] and _name(kept.dtype) == entry["kept"]
        self._file.seek(entry["offset"])
        self._file.write(_bytes(kept))

    def _kept(self, tensor: Tensor) -> Tensor:
        keeps = self._dtype is not None and tensor.is_floating_point()
        return tensor.detach().to("cpu", self._dtype if keeps else tensor.dtype).contiguous()

    def _size(self, entry: dict[str, Any]) -> int:
        return math.prod(entry["shape"]) * getattr(torch, entry["kept"]).itemsize


def _finished_entries(index: Path, content: Path) -> list[dict[str, Any]] | None:
    """Return the entries of a finished list; None if there is none, or if its files are damaged, with a warning."""
    try:
        value = read_checked(index)
        if hash_file(content) == value["content"]:
            return list(value["entries"])
        problem = f"the checksum of {content.name} is wrong"
    except FileNotFoundError as error:
        if not index.is_symlink() and str(error.filename) == str(index):
            return None
        problem = f"{content.name} is missing"
    except Damaged as error:
        problem = str(error)
    except OSError as error:
        problem = f"{content.name} cannot be read ({error.strerror})"
    log.warning("%s is damaged (%s) and is made again", index, problem)
    return None


def nbytes(tensors: TensorList) -> int:
    """Return the total bytes of the tensors in a list."""
    return tensors.nbytes if isinstance(tensors, DiskTensorList) else sum(tensor.nbytes for tensor in tensors)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
