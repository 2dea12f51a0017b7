"""A folder imports only folders of its row or above it in one table, and there are no cycles."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "recondense"

# A folder may import those of its row and of every row above it. Modules never import each other in a circle.
ROWS = (
    "errors operations full_disk files plan",
    "progress processes offline",
    "config",
    "models",
    "data",
    "calibration",
    "methods",
    "surgery",
    "recovery",
    "evaluation",
    "export",
    "report",
    "run callbacks",  # the command passes callbacks to Lightning; Hydra finds the one for sweeps by its name
)
ROW_OF = {name: index for index, row in enumerate(ROWS) for name in row.split()}


def modules() -> dict[str, Path]:
    """Every module by its dotted name within recondense; a package by the name of its folder."""
    paths = {path.relative_to(SOURCE).with_suffix("").parts: path for path in sorted(SOURCE.rglob("*.py"))}
    paths |= {path.relative_to(ROOT).with_suffix("").parts: path for path in sorted((ROOT / "callbacks").glob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for parts, path in paths.items()}


MODULES = modules()


def imported(path: Path) -> dict[str, int]:
    """The modules of this repository that a file imports, also within functions, with their lines."""
    lines: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "train":
                lines.setdefault(package, node.lineno)
            if package == "recondense":
                while rest and rest not in MODULES:  # a name within a module
                    rest = rest.rpartition(".")[0]
                lines.setdefault(rest, node.lineno)
    return lines


def test_every_folder_has_a_row() -> None:
    assert {name.partition(".")[0] for name in MODULES} - {""} == set(ROW_OF)
    assert len(ROWS) <= 17


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_go_downwards(module: str) -> None:
    folder = module.partition(".")[0]
    for other, line in imported(MODULES[module]).items():
        where = f"{MODULES[module].relative_to(ROOT)}:{line}: {folder} imports {other or 'the public API'}"
        assert other not in ("train", ""), f"{where}, which may import all of recondense"
        assert ROW_OF[other.partition(".")[0]] <= ROW_OF[folder], f"{where}, which is below {folder} in the table"


def test_there_are_no_cycles() -> None:
    imports = {
        name: [other for other in imported(path) if other in MODULES and other] for name, path in MODULES.items()
    }
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in finished:
            for other in imports[name]:
                visit(other, (*path, name))
            finished.add(name)

    for name in imports:
        visit(name, ())


def test_no_import_hides_behind_type_checking() -> None:
    """Importing a module of ours for annotations is a dependency like any other."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                hidden = [ast.unparse(inner) for inner in node.body if "recondense" in ast.unparse(inner)]
                assert not hidden or not name, f"{path.relative_to(ROOT)}:{node.lineno}: {hidden}"


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_modules_do_not_re_export_names(module: str) -> None:
    """Every name is imported from the module that defines it."""
    for node in ast.parse(MODULES[module].read_text(encoding="utf-8")).body:
        assert "__all__" not in ast.unparse(node).partition("=")[0], f"{module}:{node.lineno} re-exports names"


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if name])
def test_names_are_imported_from_where_they_are_defined(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("recondense"):
            continue
        source = (node.module or "").partition(".")[2]
        for alias in node.names:
            if f"{source}.{alias.name}".removeprefix(".") in MODULES:
                continue
            assert alias.name in _defined(source), f"{module}:{node.lineno}: {alias.name} is not defined in {source}"


def _defined(module: str) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(MODULES[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    return names


def test_the_walk_sees_imports(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(
        "import recondense.plan\ndef f():\n    from recondense.run import pipeline\n"
        "    from recondense.callbacks.sweep import X\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from recondense.models.moe_blocks import SparseBlock\n"
    )
    assert imported(file) == {"plan": 1, "run.pipeline": 3, "callbacks.sweep": 4, "models.moe_blocks": 7}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("models.replacement_blocks", {"torch"}),
        ("models.expert_products", {"torch"}),
        ("models.low_rank", {"torch", "recondense"}),
        ("models.deepseek", {"torch", "transformers"}),
        ("models.compressed_classes", {"torch", "transformers", "recondense"}),
        ("operations", {"recondense"}),
        ("plan", {"recondense"}),
        ("errors", set()),
        ("report.published", set()),
    ],
)
def test_bundled_and_plain_modules_stand_alone(module: str, allowed: set[str]) -> None:
    """Modules that are copied into exports need only torch and transformers; reading a plan needs no library."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            package = name.partition(".")[0]
            known = package in allowed or package in sys.stdlib_module_names
            assert known, f"{module}:{node.lineno} imports {package}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.partition(".")[0] not in ("run", "callbacks")])
def test_hydra_stops_at_the_command_line(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert "omegaconf" not in text and "import hydra" not in text and "from hydra" not in text
