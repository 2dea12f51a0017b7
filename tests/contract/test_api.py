"""The public API: its names, what importing it costs, and the examples of its docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.runs import config, model_folder, step, text_files
from support.runs import one_command as quiet

import recondense as rc
from recondense.run import pipeline

CPU_SECONDS = 0.15  # that importing the package may take beyond Python itself
SCRIPT = """
import time
started = time.process_time()
import recondense
seconds = time.process_time() - started
import sys
print(seconds, "torch" in sys.modules)
"""


def test_importing_the_package_takes_no_seconds() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    seconds, torch = done.stdout.split()
    assert float(seconds) <= CPU_SECONDS and torch == "False"


def test_every_name_is_there() -> None:
    assert set(rc._MODULES) == set(rc.__all__) <= set(dir(rc))
    for name in rc.__all__:
        assert getattr(rc, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rc.nothing  # noqa: B018


def test_a_verb_is_not_replaced_by_the_folder_of_its_name() -> None:
    before = rc.export
    layout = importlib.reload(importlib.import_module("recondense.export"))
    assert rc.export is before and callable(before) and layout.__name__ == "recondense.export"


def test_names_for_type_checkers_are_the_same() -> None:
    """Imports that only type checkers see come from the modules that names are really imported from."""
    source = inspect.getsource(rc)
    for name, module in rc._MODULES.items():
        [line] = [line for line in source.splitlines() if line.strip().startswith(f"from recondense.{module} import ")]
        assert name in line.partition(" import ")[2].split(", ")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the examples use: a tiny model's folder, texts, a folder to write to, and two finished runs."""
    base = tmp_path_factory.mktemp("examples")
    paths = text_files(base / "texts")
    texts = [json.loads(line)["text"] for line in Path(paths["train"]).read_text().splitlines()]
    texts += [json.loads(line)["text"] for line in Path(paths["calibration"]).read_text().splitlines()]
    folder, runs = model_folder(base / "model"), {}
    with quiet():
        for name, steps in (("first_run", 2), ("second_run", 4)):
            pipeline.run(config(folder, paths, base / name, steps=steps), [step()])
            runs[name] = str(base / name / "run")
        yield {"rc": rc, "folder": str(folder), "output": str(base / "output"), "texts": texts, **runs}


@pytest.mark.parametrize("verb", [name for name in rc.__all__ if inspect.isfunction(getattr(rc, name))])
def test_the_example_of_a_verb_runs(verb: str, names: dict[str, Any]) -> None:
    function = getattr(rc, verb)
    for part in ("Args:", "Returns:", "Raises:", "Examples:"):
        assert part in str(function.__doc__), f"{verb}: {part}"
    [example] = doctest.DocTestFinder(recurse=False).find(function, verb, globs=dict(names))
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=report.append)
    assert example.examples and not report, "".join(report)
