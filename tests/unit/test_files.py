"""Files are written completely or not at all, with the usual mode; a key gives one name on every file system."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recondense import files
from recondense.files import (
    JsonFolder,
    file_name,
    fingerprint,
    remove_partial,
    replace_file,
    replace_folder,
    write_aside,
)
from recondense.full_disk import DiskFull
from recondense.models.tensor_store import Disk

PLAIN = ("a", "experts-003", "blocks-8-8-8", "0123456789abcdef", "a_b", "states-000-0-of-1", "n" * 120)
# Long keys with long common beginnings, and keys that some file systems refuse or do not tell apart.
AWKWARD = (
    "blocks-" + "-".join(["32"] * 94),
    "blocks-" + "-".join(["32"] * 93 + ["31"]),
    *("n" * 121, "n" * 122, "ä" * 200, "Ä" * 200),
    *("A", "a/b", "A/b", "a:b", "a\\b", "a?b", "a b", "a-b/", "a+b", "a.b", "a.c", "ä", "a\u0308", "ß", "SS"),
    *("", " ", ".", "..", ".lock", "-", "a.", "a ", "a\n", "a\0", "con", "COM1", "nul", "\ud800"),
    file_name("A"),
)


def test_every_key_has_its_own_name_that_every_file_system_accepts() -> None:
    names = [file_name(key) for key in (*PLAIN, *AWKWARD)]
    assert names[: len(PLAIN)] == list(PLAIN)
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_+-]{1,120}", name) for name in names)
    assert not {"con", "com1", "nul"} & set(names)
    assert file_name("blocks-" + "-".join(["32"] * 94)).startswith("blocks-32-32"), "names are readable"


def test_a_folder_accepts_every_key(tmp_path: Path) -> None:
    folder = JsonFolder(tmp_path)
    for number, key in enumerate((*PLAIN, *AWKWARD)):
        assert key not in folder
        folder[key] = {"number": number}
    assert dict(JsonFolder(tmp_path)) == {key: {"number": n} for n, key in enumerate((*PLAIN, *AWKWARD))}
    assert json.loads((tmp_path / "experts-003.json").read_text()).keys() == {"number", files.CHECKSUM}
    assert len(list(tmp_path.iterdir())) == len(folder) == len(PLAIN) + len(AWKWARD)
    for key in AWKWARD:
        del folder[key]
    assert sorted(folder) == sorted(PLAIN)


def test_a_tensor_list_accepts_every_name(tmp_path: Path) -> None:
    """Also names that differ only after a dot, where a suffix would begin."""
    for number, name in enumerate(AWKWARD):
        tensors = Disk(tmp_path).tensor_list(name)
        tensors.append(torch.tensor([number]))
        tensors.finish()  # type: ignore[attr-defined]
    assert [int(Disk(tmp_path).tensor_list(name)[0]) for name in AWKWARD] == list(range(len(AWKWARD)))


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_write_aside_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    old = tmp_path / "file"
    write_aside(old, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, where, fail)
    for path in (old, tmp_path / "other"):
        with pytest.raises(DiskFull, match=f"{path.name} cannot be written: the disk is full .it needs 3 B"):
            write_aside(path, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert old.read_text() == "old"


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path, root: Path) -> None:
    """SIGKILL between writing and renaming: nothing can be cleaned up, but the old file keeps its name."""
    path = tmp_path / "file"
    write_aside(path, "old")
    code = (
        f"import os, signal, sys; sys.path.insert(0, {str(root / 'src')!r}); "
        "import recondense.files as files; "
        "files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
        f"files.write_aside({str(path)!r}, 'new' * 100)"
    )
    assert subprocess.run([sys.executable, "-I", "-S", "-c", code]).returncode == -9
    assert path.read_text() == "old"
    assert all(other.name.startswith(".") for other in tmp_path.iterdir() if other != path)


def test_write_aside_bytes_text_and_permissions(tmp_path: Path) -> None:
    write_aside(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    write_aside(tmp_path / "text", "w̄ ä\n")
    assert (tmp_path / "text").read_text(encoding="utf-8") == "w̄ ä\n"
    (tmp_path / "plain").write_text("")
    assert os.stat(tmp_path / "text").st_mode == os.stat(tmp_path / "plain").st_mode  # others may read a shared cache


def test_json_folder_is_a_mapping(tmp_path: Path) -> None:
    folder = JsonFolder(tmp_path / "cache")
    assert len(folder) == 0 and "a" not in folder and folder.get("a") is None
    folder["b"] = {"x": [1, None]}
    folder["a"] = {}
    (tmp_path / "cache" / ".a.json.partial").write_text("{")
    assert dict(folder) == {"a": {}, "b": {"x": [1, None]}}
    assert list(JsonFolder(tmp_path / "cache")) == ["a", "b"]
    with pytest.raises(ValueError, match="JSON"):
        folder["b"] = {"x": float("inf")}
    assert folder["b"] == {"x": [1, None]}
    del folder["a"]
    with pytest.raises(KeyError):
        del folder["a"]


def test_fingerprint_depends_on_values_not_on_their_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert len({fingerprint(*parts) for parts in ((1, 2), (2, 1), ([1, 2],), ("1", 2))}) == 4


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_is_what_the_umask_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int) -> None:
    """Also for what safetensors writes for the owner only. The umask belongs to the process and never changes."""
    before = os.umask(umask)
    try:
        monkeypatch.setattr(os, "umask", None)  # a call would fail

        def write(number: int) -> None:
            write_aside(tmp_path / f"plain-{number}", "text")
            with replace_file(tmp_path / f"tensors-{number}") as aside:
                save_file({"a": torch.zeros(1)}, aside)
            with replace_folder(tmp_path / f"folder-{number}") as folder:
                save_file({"a": torch.zeros(1)}, folder / "tensors")
                (folder / "below").mkdir()
                (folder / "below" / "text").write_text("text")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(24)))
    finally:
        monkeypatch.undo()
        assert os.umask(before) == umask
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 24 * 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~umask}


def test_threads_that_write_the_same_file_leave_one_complete_version(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_aside(tmp_path / "file", f"{number}" * 10_000), range(40)))
    content = (tmp_path / "file").read_text()
    assert content in {f"{number}" * 10_000 for number in range(40)}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_a_folder_is_replaced_completely_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    folder = tmp_path / "model"

    def write(content: str) -> None:
        with replace_folder(folder) as aside:
            (aside / content).write_text(content)

    write("old")
    with pytest.raises(failure), replace_folder(folder) as aside:
        (aside / "half").write_text("new")
        raise failure
    rename = os.replace
    for number in (1, 2):  # renaming the old folder away, and the new one to its place
        calls = iter(range(1, 3))

        def fail_at(*paths: Path, at: int = number, calls: Iterator[int] = calls) -> None:
            if next(calls) == at:
                raise failure
            rename(*paths)

        with monkeypatch.context() as patch, pytest.raises(failure):
            patch.setattr(files.os, "replace", fail_at)
            write("new")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert [path.name for path in folder.iterdir()] == ["old"]
    (tmp_path / ".model.partial").mkdir()  # left by a kill
    (tmp_path / ".model.partial" / "half").touch()
    write("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    with replace_file(tmp_path / "step=3.ckpt") as aside:
        pass
    aside.touch()
    remove_partial(tmp_path)
    remove_partial(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["step=3.ckpt"]


def test_the_umask_is_never_set_in_order_to_read_it(root: Path) -> None:
    for folder in ("src", "callbacks"):
        for path in (root / folder).rglob("*.py"):
            assert "umask(" not in path.read_text(encoding="utf-8"), path


def test_one_module_writes_files_aside(root: Path) -> None:
    """Other modules pass it what they write."""
    pattern = re.compile(r"\b(os\.fsync|mkstemp|NamedTemporaryFile)\(|\.partial\b")
    allowed = {
        "files.py",
        "tensor_store.py",
    }  # a tensor list is written row by row, and a file of its own says that it is finished
    for path in (root / "src").rglob("*.py"):
        assert path.name in allowed or not pattern.search(path.read_text(encoding="utf-8")), path
