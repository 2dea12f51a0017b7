"""An export is compared with the model that its config describes before it gets its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import EVERY
from torch import Tensor

from recondense.config.schema import ExportConfig
from recondense.export import write_folder as export_module
from recondense.export.write_folder import write_folder
from recondense.operations import Factorize, Prune
from recondense.plan import Plan
from recondense.surgery import execute

State = dict[str, Tensor]
Change = Callable[[str, Tensor], tuple[str, Tensor]]
WRONG: dict[str, tuple[Change, str]] = {
    "names": (lambda name, value: (name.replace("q_proj", "q_proj.base_layer"), value), r"missing.*unexpected.*base_"),
    "shapes": (
        lambda name, value: (name, value[:, :16].clone() if "o_proj" in name else value),
        "3 other shapes: .*",
    ),
    "one": (
        lambda name, value: (name.replace("lm_head", "head"), value),
        "1 missing: lm_head.weight; 1 unexp",
    ),
}


@pytest.mark.parametrize("form", ["stock", "bundled", "dense"])
@pytest.mark.parametrize("kind", WRONG)
def test_an_export_that_would_not_load_gets_no_name(
    form: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = WRONG[kind]
    model = EVERY["qwen2_moe"]()
    plan = Plan("tiny", (Prune(0, (0, 2, 3, 5)),) if form == "bundled" else ())
    if form == "dense":
        plan = Plan("tiny", (Factorize(0, dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (4,) * 6)),))
    execute.execute(model, plan)
    write_folder(model, None, plan, tmp_path / "out", "before", ExportConfig(format=form))
    before = (tmp_path / "out" / "README.md").read_text()
    pieces = export_module.pieces

    def change_pieces(*args: Any) -> Iterator[State]:
        return (dict(change(*item) for item in piece.items()) for piece in pieces(*args))

    monkeypatch.setattr(export_module, "pieces", change_pieces)
    with pytest.raises(AssertionError, match=f"the export does not match .*: .*{message}"):
        write_folder(model, None, plan, tmp_path / "out", "after", ExportConfig(format=form))
    assert (tmp_path / "out" / "README.md").read_text() == before
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(AssertionError):
        write_folder(model, None, plan, tmp_path / "out", "after", ExportConfig(format=form))
    assert list(tmp_path.iterdir()) == []
