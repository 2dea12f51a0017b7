"""An interrupted export, and one that replaces another, leave a complete folder or none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import condense_plan, deepseek_v2, qwen2_moe

from recondense import files
from recondense.export import shard_writer
from recondense.export import write_folder as export_module
from recondense.export.write_folder import write_folder
from recondense.plan import Plan
from recondense.surgery import execute

VARIANTS: dict[str, tuple[Callable[[], Any], tuple[int, ...], float | None]] = {
    "qwen": (qwen2_moe, (2, 0, 1), 0.4),
    "qwen, token gate": (qwen2_moe, (1, 2), None),
    "deepseek": (deepseek_v2, (1, 2), 0.4),
}


def student(name: str) -> tuple[Any, Plan]:
    make, layers, shared_gate = VARIANTS[name]
    model = make()
    plan = condense_plan(model, layers, shared_gate=shared_gate)
    execute.execute(model, plan)
    return model.eval(), plan


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("variant", ["qwen", "deepseek"])
@pytest.mark.parametrize("where", ["shards", "write_aside", "plan", "os.replace"])
def test_an_interrupted_export_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, where: str
) -> None:
    """Under the final name there is no folder, or the complete former one. Nothing else is left behind."""
    model, plan = student(variant)
    folder = tmp_path / "model"

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def broken() -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if where == "shards":
                patch.setattr(shard_writer.ShardWriter, "finish", interrupted)
            elif where == "write_aside":
                patch.setattr(export_module, "write_aside", interrupted)
            elif where == "plan":
                patch.setattr(Plan, "save", interrupted)
            else:
                patch.setattr(files.os, "replace", interrupted)
            write_folder(model, None, plan, folder, "card")

    broken()
    assert not folder.exists()
    write_folder(model, None, plan, folder, "card")
    before = contents(folder)
    broken()
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    write_folder(model, None, plan, folder, "another card")
    assert contents(folder) == {**before, "README.md": before["README.md"].replace(b"card", b"another card", 1)}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_replacing_an_export_never_leaves_half_of_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the old folder is removed: under the final name there is a complete export, or nothing."""
    model, plan = student("qwen")
    folder = tmp_path / "model"
    write_folder(model, None, plan, folder, "old")
    old = contents(folder)
    new = {**old, "README.md": old["README.md"].replace(b"old", b"new", 1)}
    remove = shutil.rmtree

    def killed(path: Any, *args: Any, **kwargs: Any) -> None:
        path = Path(path)
        if path.exists() and "config.json" in {file.name for file in path.iterdir()}:
            (path / "config.json").unlink()
            raise KeyboardInterrupt
        remove(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", killed)
        with suppress(KeyboardInterrupt):
            write_folder(model, None, plan, folder, "new")
    assert not folder.exists() or contents(folder) in (old, new)
    write_folder(model, None, plan, folder, "new")
    assert contents(folder) == new


def test_a_second_export_replaces_the_first(tmp_path: Path) -> None:
    """Also where its kind is another one: no file of the old export remains."""
    for name in ("qwen, token gate", "qwen"):
        model, plan = student(name)
        write_folder(model, None, plan, tmp_path / "model", name)
    assert not (tmp_path / "model" / "modeling_recondense.py").exists()
    assert Plan.load(tmp_path / "model" / "plan.json") == plan
