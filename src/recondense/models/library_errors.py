"""Errors that libraries raise about a user's model: the user can fix them. Errors of recondense are not touched."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from recondense.config.problems import json_type
from recondense.errors import UserError

PACKAGE = Path(__file__).parents[1]
# Classes of models, which read the values of a config as those of transformers do.
MODEL_CLASSES = ("compressed_classes.py", "deepseek.py", "low_rank.py", "replacement_blocks.py", "expert_products.py")
PLAIN = (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError)  # their messages are sentences
MISTAKES = (NameError, AttributeError, TypeError, LookupError, AssertionError)  # of the statement that calls a library
LONGEST_REASON = 400
NO_MEMORY = ("can't allocate memory", "not enough memory", "cannot allocate memory", "out of memory")
MORE_MEMORY = "use model.streaming=true, model.dtype=bfloat16, or a device with more memory (model.device)"

GIT_LFS = b"version https://git-lfs"  # the beginning of a file that Git LFS has not downloaded


@contextmanager
def library_calls(what: str, memory: str = "use a machine with more memory") -> Iterator[None]:
    """Turn what a library raises about the user's files into a UserError, inside the context.

    An error that recondense raises, such as in a function that the library calls back, is a defect of recondense, and
    keeps its traceback.

    Args:
        what: the beginning of the message, which the reason follows after a colon.
        memory: what helps if there is not enough memory.

    Raises:
        UserError: a library has raised an error.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if _is_ours(error) or (isinstance(error, SystemExit) and not is_exit(error)):
            raise
        if is_out_of_memory(error):
            raise UserError(f"{what}: there is not enough memory; {memory}") from error
        raise UserError(f"{what}: {reason_of(error)}") from error


@contextmanager
def without_warnings() -> Iterator[None]:
    """Hide transformers' warnings inside the context: what is read in it is read again when it is used."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def is_exit(error: BaseException) -> bool:
    """Return whether somebody else's code has called sys.exit. How signals and launchers end a run is not meant."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return type(error) is SystemExit and not Path(frames[-1].f_code.co_filename).is_relative_to(PACKAGE)


def _is_ours(error: BaseException) -> bool:
    """Return whether an error inside `library_calls` was raised by recondense, or came through a function of it."""
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    files = [file for file in files if file not in (Path(__file__), Path(contextlib.__file__))]
    inside = files[1:]  # the first one is the function with the `with` statement
    if not inside and isinstance(error, MISTAKES):
        return True
    return any(file.is_relative_to(PACKAGE) and file.name not in MODEL_CLASSES for file in inside)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the machine or a GPU has too little memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error).lower() for text in NO_MEMORY)


def reason_of(error: BaseException) -> str:
    """Return the message of a library's error on one line; with the error's type if it may be no sentence."""
    if isinstance(error, SystemExit):
        return f"its code calls sys.exit({'' if error.code is None else repr(error.code)})"
    text = " ".join(str(error).split()).removesuffix(".")
    if len(text) > LONGEST_REASON:
        text = f"{text[:LONGEST_REASON]} ..."
    name = type(error).__name__
    return text if text and isinstance(error, PLAIN) else f"{name}: {text}" if text else name


def damage(file: Path) -> str:
    """Return why a file cannot be what its name says, from its first bytes; empty if these say nothing.

    Args:
        file: a file of a model, or a link to one, which may point nowhere.
    """
    if file.is_symlink() and not file.exists():  # in a cache of the hub from which files were deleted
        return f"{file.name} is a link to a file that does not exist; download or copy the model again"
    with file.open("rb") as content:
        start = content.read(len(GIT_LFS))
    if start == GIT_LFS:
        return f"{file.name} is a Git LFS pointer, not the file itself; run `git lfs pull`"
    return "" if start else f"{file.name} is empty; download or copy it again"


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model.

    Raises:
        UserError: the file cannot be read, or is not JSON, or holds something else than an object.
    """
    if not file.exists():
        raise UserError(damage(file) if file.is_symlink() else f"{file.name} is missing; download or copy it")
    with library_calls(f"{file.name} cannot be read"):
        text = file.read_bytes()
    if problem := damage(file):
        raise UserError(problem)
    try:
        values = json.loads(text.decode())
    except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError, too
        raise UserError(
            f"{file.name} is not valid JSON ({reason_of(error)}); download or copy it again, or correct it"
        ) from error
    if not isinstance(values, Mapping):
        raise UserError(f"{file.name} holds {json_type(values)}, not an object of names and values; download it again")
    return dict(values)
