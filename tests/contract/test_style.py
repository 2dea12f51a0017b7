"""Sizes and names that keep the sources readable: short files, classes and functions; names that say the content."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])
LINES_OF_A_FILE = 350
LINES_OF_A_CLASS = 250
LINES_OF_A_FUNCTION = 50
EMPTY_NAMES = ("found", "each", "own", "wanted", "left")  # they say where a value comes from, not what it is
SHOWN = 20

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def place(path: Path, node: ast.stmt | ast.expr | ast.arg | None = None) -> str:
    return f"{path.relative_to(ROOT)}" + ("" if node is None else f":{node.lineno}")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def num_lines(node: ast.stmt) -> int:
    """From the line of `def` or `class` to the last one, docstring included, decorators not."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def worst(sizes: dict[str, int], limit: int) -> str:
    """The sizes above a limit, the largest first."""
    above = sorted(((size, name) for name, size in sizes.items() if size > limit), reverse=True)
    lines = [f"{size:5d} {name}" for size, name in above[:SHOWN]]
    if len(above) > SHOWN:
        lines.append(f"      and {len(above) - SHOWN} more")
    return "\n".join(lines)


def sizes_of(kinds: type[ast.stmt] | tuple[type[ast.stmt], ...]) -> dict[str, int]:
    """Lines of every class or function of the sources, by place and name."""
    return {
        f"{place(path, node)} {getattr(node, 'name', '')}": num_lines(node)
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, kinds)
    }


def test_files_are_short() -> None:
    sizes = {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    above = worst(sizes, LINES_OF_A_FILE)
    assert not above, f"files of more than {LINES_OF_A_FILE} lines:\n{above}"


def test_classes_are_short() -> None:
    above = worst(sizes_of(ast.ClassDef), LINES_OF_A_CLASS)
    assert not above, f"classes of more than {LINES_OF_A_CLASS} lines:\n{above}"


def test_functions_are_short() -> None:
    above = worst(sizes_of(FUNCTIONS), LINES_OF_A_FUNCTION)
    assert not above, f"functions of more than {LINES_OF_A_FUNCTION} lines, docstring included:\n{above}"


def variables(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every binding of a name: arguments, assignments, targets of loops, comprehensions and `with`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr.lstrip("_"), node.lineno


def test_variables_say_what_they_hold() -> None:
    counts = {place(path): sum(name in EMPTY_NAMES for name, _ in variables(parsed(path))) for path in SOURCES}
    assert not any(counts.values()), f"variables are named {', '.join(EMPTY_NAMES)}:\n{worst(counts, 0)}"
