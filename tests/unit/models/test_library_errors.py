"""What a library raises about a user's files becomes one sentence; what recondense raises keeps its traceback."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from recondense.errors import UserError
from recondense.models.families import original_facts
from recondense.models.library_errors import damage, library_calls, read_json, reason_of
from recondense.run.exit_codes import Reported, exit_codes

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"


def run(call: Callable[[], Any]) -> None:
    with library_calls("model.path=x"):
        call()


def in_a_library(error: BaseException) -> Callable[[], Any]:
    """A call into a library that raises an error: json calls the function with each object it reads."""

    class Raises(json.JSONEncoder):
        def default(self, o: object) -> object:
            raise error

    return lambda: json.dumps(object(), cls=Raises)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("a\n  sentence."), "model.path=x: a sentence"),
        (OSError("no file"), "model.path=x: no file"),
        (KeyError("nope"), "model.path=x: KeyError: 'nope'"),
        (ZeroDivisionError(), "model.path=x: ZeroDivisionError"),
        (SystemExit(3), "model.path=x: its code calls sys.exit(3)"),
        (SystemExit(), "model.path=x: its code calls sys.exit()"),
        (SystemExit("not supported"), "model.path=x: its code calls sys.exit('not supported')"),
        (AttributeError("no rank"), "model.path=x: AttributeError: no rank"),
        (MemoryError(), "model.path=x: there is not enough memory; use a machine with more memory"),
        (torch.OutOfMemoryError("CUDA"), "model.path=x: there is not enough memory; use a machine with more memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "model.path=x: there is not enough memory; use a machine with more memory",
        ),
    ],
)
def test_an_error_of_a_library_is_a_sentence(error: BaseException, message: str) -> None:
    with pytest.raises(UserError) as raised:
        run(in_a_library(error))
    assert str(raised.value) == message and raised.value.__cause__ is error


def test_signals_and_interrupts_are_no_errors_of_a_library() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(in_a_library(KeyboardInterrupt()))
    with pytest.raises(Reported):
        run(in_a_library(Reported(1)))
    with pytest.raises(Reported) as ended, exit_codes():
        run(lambda: json.dumps(object(), default=lambda _: signal.raise_signal(signal.SIGTERM)))
    assert ended.value.code == 143


def test_real_libraries(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    with pytest.raises(UserError, match=r"^weights: Error while deserializing header"), library_calls("weights"):
        safe_open(tmp_path / "a.safetensors", framework="pt")
    with pytest.raises(UserError, match=r"^config: .*nobody"), library_calls("config"):
        AutoConfig.for_model("nobody")
    with pytest.raises(UserError, match=r"^sizes: RuntimeError: .*negative"), library_calls("sizes"):
        torch.zeros(-1)


def test_a_defect_of_recondense_keeps_its_traceback() -> None:
    for error, call in (
        (AttributeError, lambda: original_facts(None)),  # type: ignore[arg-type]
        (AttributeError, lambda: json.loads("{}", object_hook=original_facts)),  # a library calls it back
    ):
        with pytest.raises(error), library_calls("model.path=x"):
            call()
    with pytest.raises(NameError), library_calls("model.path=x"):
        undefined  # type: ignore[name-defined]  # noqa: B018, F821
    with pytest.raises(TypeError), library_calls("model.path=x"):
        len(5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^as it was$"), library_calls("model.path=x"):
        raise UserError("as it was")
    with pytest.raises(KeyboardInterrupt), library_calls("model.path=x"):
        raise KeyboardInterrupt


def test_long_reasons_are_cut() -> None:
    assert len(reason_of(ValueError("word " * 1000))) < 450


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"^a\.json is empty; download"),
        (POINTER, r"^a\.json is a Git LFS pointer, .*; run `git lfs pull`"),
        (b'{"a": "b', r"^a\.json is not valid JSON \(Unterminated string"),
        (b"<html>404</html>", r"^a\.json is not valid JSON"),
        (b"\xff\xfe{", r"^a\.json is not valid JSON \('utf-8' codec"),
        ('{"a": 1}'.encode("utf-16"), r"^a\.json is not valid JSON"),
        (b"[" * 100_000, r"^a\.json is not valid JSON \(RecursionError"),
        (b"[1]", r"^a\.json holds a list, not an object"),
        (b'"text"', r"^a\.json holds a text, not an object"),
        (b"null", r"^a\.json holds null, not an object"),
    ],
)
def test_a_damaged_json_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "a.json")


def test_files_of_other_kinds(tmp_path: Path) -> None:
    for content, message in ((POINTER, "Git LFS pointer"), (b"", "is empty"), (b"anything", "")):
        (tmp_path / "tokenizer.model").write_bytes(content)
        assert message in damage(tmp_path / "tokenizer.model")
        assert bool(message) == bool(damage(tmp_path / "tokenizer.model"))
    with pytest.raises(UserError, match=r"^b\.json is missing"):
        read_json(tmp_path / "b.json")
    (tmp_path / "c.json").mkdir()
    with pytest.raises(UserError, match=r"^c\.json cannot be read: .*directory"):
        read_json(tmp_path / "c.json")
