"""Unit tests mirror the sources: tests/unit/<folder>/test_<module>.py, or test_<module>_<aspect>.py."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "tests" / "unit"
FILES = sorted(path.relative_to(UNIT) for path in UNIT.rglob("test_*.py"))


def modules_of(folder: Path) -> set[str]:
    """The modules and packages of a folder of the sources, or of callbacks."""
    sources = ROOT / folder if folder.parts[:1] == ("callbacks",) else ROOT / "src" / "recondense" / folder
    packages = {path.parent.name for path in sources.glob("*/__init__.py")}
    return packages | {path.stem for path in sources.glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_unit_test_names_its_module(path: Path) -> None:
    name, modules = path.stem.removeprefix("test_"), modules_of(path.parent)
    assert any(f"{name}_".startswith(f"{module}_") for module in modules), (
        f"tests/unit/{path}: there is no module for it in {path.parent}; the modules are {', '.join(sorted(modules))}"
    )


def test_tests_are_in_folders_of_their_kind() -> None:
    """Code that tests share is in tests/support."""
    assert FILES
    kinds = {"contract", "golden", "gpu", "integration", "support", "unit"}
    assert {path.name for path in (ROOT / "tests").iterdir() if path.name != "__pycache__"} == {*kinds, "conftest.py"}
