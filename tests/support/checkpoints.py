"""Folders with a tiny model and a tokenizer, and the damage that users' folders have."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.small import byte_tokenizer
from support.tiny_models import tiny

Change = Callable[[Path], object]
State = dict[str, Tensor]

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def checkpoint(folder: Path, family: str = "qwen2_moe", *changes: Change, shards: bool = False) -> Path:
    """Write a tiny model of a family with its tokenizer to a folder, and damage it."""
    tiny(family, vocab_size=300).save_pretrained(folder, **({"max_shard_size": "60KB"} if shards else {}))
    byte_tokenizer().save_pretrained(folder)
    for change in changes:
        change(folder)
    return folder


def config(**values: Any) -> Change:
    """Set values of config.json."""
    return json_values("config.json", **values)


def json_values(name: str, **values: Any) -> Change:
    """Set values of a JSON file."""

    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def content(name: str, data: bytes | str) -> Change:
    """Replace a file."""
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def cut(name: str) -> Change:
    """Keep the first half of a file."""
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def remove(*names: str) -> Change:
    """Remove files."""
    return lambda folder: [(folder / name).unlink() for name in names]


def weights(change: Callable[[State], State]) -> Change:
    """Change the weights of a model in one file."""
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def shard(number: int, data: bytes) -> Change:
    """Replace one of several files of weights."""
    return lambda folder: sorted(folder.glob("model-*.safetensors"))[number].write_bytes(data)


@contextmanager
def remote_code_in(folder: Path) -> Iterator[None]:
    """Let transformers copy remote code to a folder instead of the user's cache, inside the context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        patch.setattr("sys.path", [*sys.path])
        known = set(sys.modules)
        yield
        for name in set(sys.modules) - known:
            if name.startswith("transformers_modules"):
                del sys.modules[name]
