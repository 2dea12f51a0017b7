"""Imports go downwards only, and every module has its level."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "recondense"

LEVELS = {
    0: (
        *(
            "__init__",
            "errors",
            "operations",
            "plan",
            "modules",
            "low_rank",
            "decomposition",
            "losses",
            "config",
            "reading",
        ),
        *("checks", "progress", "cache", "modes", "deepseek", "bundle", "layouts", "published", "papers", "stages"),
        *("instructions", "quantized", "processes", "chunking", "fused", "shelves", "launching"),
        *("errors", "run_folder"),
    ),
    1: (
        *("families", "textfiles", "hub", "mixing", "corpora", "data", "templates", "packing", "heldout", "tasks"),
        *("loading", "adapters", "recorded", "passes", "paging", "strategies"),
    ),
    2: (
        *("calibrate", "methods", "surgery", "teacher", "teacher_cache", "evaluate", "profiling", "report", "pictures"),
        *("tracking", "engines", "sharding"),
    ),
    3: (
        *("recovery", "fitting", "recovering", "export", "shards", "searching", "measure", "summary", "structures"),
        *("tiny", "sizes", "inputs"),
        *("comparison", "comparison_picture"),
    ),
    4: ("pipeline", "plan_only", "preflight", "sweeping"),
    5: ("command_line",),
}
LEVEL_OF = {module: level for level, modules in LEVELS.items() for module in modules}


def modules() -> dict[str, list[Path]]:
    """Files of each module; a package such as methods/ is one module."""
    found: dict[str, list[Path]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        found.setdefault(path.relative_to(SOURCE).with_suffix("").parts[0], []).append(path)
    return found


def imported(path: Path, *, types: bool = True) -> dict[str, int]:
    """Modules of this repository that a file imports anywhere, also inside functions, with the line.

    Args:
        types: whether imports under `if TYPE_CHECKING` count.
    """
    found: dict[str, int] = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = set() if types else {inner for node in ast.walk(tree) if _for_types(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        names: list[str] = []
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            first = rest.partition(".")[0]
            if package == "recondense":
                # `from recondense import __version__` imports the package itself
                found.setdefault(first if first in modules() else "__init__", node.lineno)
            elif package in ("callbacks", "train"):
                found.setdefault(package, node.lineno)
    return found


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_every_module_has_a_level() -> None:
    assert set(modules()) == set(LEVEL_OF), "the table above names each module of src/recondense, and no other"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_downwards(module: str) -> None:
    level = LEVEL_OF[module]
    for path in modules()[module]:
        for other, line in imported(path).items():
            where = f"{path.relative_to(ROOT)}:{line}: level {level} imports {other}"
            assert other not in ("callbacks", "train"), f"{where}, which stands above all of recondense"
            assert LEVEL_OF[other] <= level, f"{where} of level {LEVEL_OF[other]}"


@pytest.mark.parametrize("module", LEVELS[2])
def test_modules_of_level_2_do_not_import_each_other(module: str) -> None:
    """What they are handed they may name in annotations."""
    for path in modules()[module]:
        for other, line in imported(path, types=False).items():
            assert other == module or LEVEL_OF[other] < 2, f"{path.relative_to(ROOT)}:{line}: imports {other}"


def test_the_walk_sees_imports(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(
        "import recondense.plan\ndef f():\n    from recondense import pipeline\n    from callbacks.sweep import X\n"
    )
    assert imported(file) == {"plan": 1, "pipeline": 3, "callbacks": 4}
    file.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from recondense.calibrate import Tape\n")
    assert imported(file) == {"calibrate": 3} and imported(file, types=False) == {}


@pytest.mark.parametrize("module", ["modules", "low_rank", "deepseek", "bundle", "operations", "plan", "published"])
def test_bundled_and_plain_modules_stand_alone(module: str) -> None:
    """What is copied into exports needs torch alone, or transformers too; plans are readable without any library."""
    allowed: set[str] = {
        "modules": {"torch"}, "low_rank": {"torch"}, "deepseek": {"torch", "transformers"},
        "bundle": {"torch", "transformers", "recondense"}, "plan": {"recondense"},
        "operations": {"recondense"},
    }.get(module, set())  # fmt: skip
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            package = name.partition(".")[0]
            assert package in allowed or _is_stdlib(package), f"{module}.py:{node.lineno} imports {package}"


def test_hydra_stops_at_the_command_line() -> None:
    for module, paths in modules().items():
        for path in paths if module != "command_line" else ():
            text = path.read_text(encoding="utf-8")
            assert "omegaconf" not in text and "import hydra" not in text and "from hydra" not in text, path


def _is_stdlib(package: str) -> bool:
    return package in sys.stdlib_module_names
