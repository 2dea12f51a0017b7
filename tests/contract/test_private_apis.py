"""docs/private_apis.md lists the private names of libraries. They are where they were, and used where the page says.

The sources of the libraries are read and not imported, which is fast and needs no GPU for DeepSpeed.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "private_apis.md"
NOT_LIBRARIES = ("recondense", "__future__", "_typeshed")
UNDOCUMENTED = ("transformers.core_model_loading", "transformers.conversion_mapping")

# The parameters that we pass, or that our replacement of a function takes. A library may add others after them.
PARAMETERS = {
    "PreTrainedModel._load_pretrained_model": "model state_dict checkpoint_files load_config",
    "convert_and_load_state_dict_in_model": "model state_dict load_config",
    "rename_source_key": "source_key weight_renamings weight_converters base_model_prefix meta_state_dict",
    "dot_natural_key": "s",
    "revert_weight_conversion": "model state_dict",
    "get_model_conversion_mapping": "model",
    "get_checkpoint_conversion_mapping": "model_type",
    "register_checkpoint_conversion_mapping": "model_type_or_class_name mapping overwrite",
    "Fp8Dequantize._dequantize_one": "self quantized scales output_dtype",
    "PreTrainedModel._can_set_experts_implementation": "cls",
    "cached_file": "path_or_repo_id filename",
    "get_cache_dir": "",
    "get_data_dir": "",
    "get_args_parser": "",
    "BasicSweeper.split_arguments": "overrides max_batch_size",
    "create_automatic_config_search_path": "calling_file calling_module config_path",
    "detect_calling_file_or_module_from_task_function": "task_function",
    "Hydra.create_main_hydra2": "cls task_name config_search_path",
    "ConfigLoaderImpl._parse_overrides_and_create_caching_repo": "self config_name overrides",
    "ModelCheckpoint._monitor_candidates": "self trainer",
    "ModelCheckpoint._save_topk_checkpoint": "self trainer monitor_candidates",
    "ModelCheckpoint._save_last_checkpoint": "self trainer monitor_candidates",
    "DeepSpeedStrategy._init_deepspeed_distributed": "self",
    "DeepSpeedStrategy._init_config_if_needed": "self",
    "DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state": "self",
    "load_yaml": "path resolve_func",
    "TaskManager.task_index": "self",
}


class Row(NamedTuple):
    name: str
    version: str
    modules: tuple[str, ...]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


def rows() -> list[Row]:
    lines = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [Row(name, version, tuple(re.findall(r"`([^`]+)`", modules))) for name, version, modules in lines]


ROWS = rows()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def source_of(name: str) -> tuple[Path, list[str]]:
    """The file of a library that defines a dotted name, and the parts of the name within it."""
    library, *parts = name.split(".")
    spec = find_spec(library)
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent
    while parts and (path / parts[0]).is_dir():
        path /= parts.pop(0)
    module = path / f"{parts[0]}.py"
    return (module, parts[1:]) if module.is_file() else (path / "__init__.py", parts)


def mentions(tree: ast.AST, name: str) -> bool:
    """Whether a source has a definition, an attribute, a parameter or a string with this name."""
    for node in ast.walk(tree):
        texts: list[object] = [getattr(node, field, None) for field in ("name", "attr", "arg", "id", "value")]
        if name in [text for text in texts if isinstance(text, str)]:
            return True
    return False


def problem_of(name: str) -> str:
    """What differs from the way recondense uses the name; empty if nothing does."""
    path, parts = source_of(name)
    if not path.is_file():
        return f"there is no module {path}"
    scope: ast.AST = parsed(path)
    for part in parts:
        inner = [node for node in getattr(scope, "body", []) if getattr(node, "name", None) == part]
        if not inner:
            return "" if part == parts[-1] and mentions(scope, part) else f"{path} has no {part}"
        scope = inner[-1]
    key = ".".join(parts)
    if isinstance(scope, ast.FunctionDef):
        if key not in PARAMETERS:
            return "the test does not say which parameters are passed"
        names = [argument.arg for argument in (*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs)]
        expected = PARAMETERS[key].split()
        if names[: len(expected)] != expected:
            return f"its parameters are {names}, not {expected}"
    return ""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_name_is_where_it_was(row: Row) -> None:
    library = row.name.partition(".")[0]
    problem = problem_of(row.name)
    assert not problem, (
        f"{library} has moved a name that recondense uses, {row.name}: {problem}. It was read in {library} "
        f"{row.version}; change {', '.join(row.modules)} and docs/private_apis.md"
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_modules_use_it(row: Row) -> None:
    for module in row.modules:
        path = ROOT / module if module.startswith("callbacks") else ROOT / "src" / "recondense" / module
        assert mentions(parsed(path), row.leaf), f"{module} does not use {row.name}: docs/private_apis.md is old"


def test_every_private_import_is_listed() -> None:
    listed = {(row.name.rpartition(".")[0], row.leaf, module) for row in ROWS for module in row.modules}
    classes = {(name.rpartition(".")[0], name.rpartition(".")[2], module) for name, _, module in listed}
    sources = [(ROOT / "src" / "recondense", ROOT / "src" / "recondense"), (ROOT / "callbacks", ROOT)]
    for folder, base in sources:
        for path in sorted(folder.rglob("*.py")):
            for node in ast.walk(parsed(path)):
                if not isinstance(node, ast.ImportFrom) or (node.module or "").startswith(NOT_LIBRARIES):
                    continue
                module = node.module or ""
                if module in UNDOCUMENTED or any(part.startswith("_") for part in module.split(".")):
                    for alias in node.names:
                        use = (module, alias.name, path.relative_to(base).as_posix())
                        assert use in listed | classes, (
                            f"{use[2]}:{node.lineno}: {module}.{alias.name} is not on {PAGE}"
                        )


def test_a_name_that_moved_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no renamed" in problem_of("hydra._internal.utils.renamed")
    assert "has no Renamed" in problem_of("hydra._internal.hydra.Renamed.create_main_hydra2")
    monkeypatch.setitem(PARAMETERS, "get_args_parser", "arguments")
    assert "its parameters are []" in problem_of("hydra._internal.utils.get_args_parser")
