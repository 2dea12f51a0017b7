"""Load a model's tokenizer, without its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from recondense.config.checks import ADAPTER, HOLDS_ADAPTER
from recondense.config.schema import ModelConfig
from recondense.errors import UserError
from recondense.files import fingerprint
from recondense.models.model_files import model_file
from recondense.offline import hub_access

CALL_STATE = ("truncation", "padding")  # entries of a fast tokenizer that depend on its last call


def load_tokenizer(path: str | Path, settings: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or the one that the settings name.

    Args:
        path: the model's hub id or folder.
        settings: tokenizer, revision and trust_remote_code are used.

    Raises:
        UserError: there is no tokenizer, its files are damaged, or a package that it needs is missing.
    """
    with reading(path, settings):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            settings.tokenizer or path,
            # The revision is that of the model's repository, not of another one with the tokenizer.
            revision=settings.revision if settings.tokenizer is None else None,
            trust_remote_code=settings.trust_remote_code,
        )
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # transformers' default without a tokenizer
        raise UserError(f"model.path={path}: has no tokenizer; set model.tokenizer to a folder or hub id that has one")
    return tokenizer


@contextmanager
def reading(path: str | Path, settings: ModelConfig) -> Iterator[None]:
    """Turn errors about the files of a model into a UserError that names it, inside the context.

    Args:
        path: the model's hub id or folder.
        settings: settings of the model.
    """
    if model_file(path, ADAPTER, settings.revision) is not None:
        raise UserError(f"model.path={path}: {HOLDS_ADAPTER}")
    try:
        # Otherwise each look-up on an unreachable hub is repeated for 20 s, even of a file that is in the cache.
        local = Path(path).is_dir() and (settings.tokenizer is None or Path(settings.tokenizer).is_dir())
        with nullcontext() if local else hub_access():
            yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # a package may be missing
        if Path(path).is_dir() or not isinstance(error, OSError):
            raise UserError(f"model.path={path}: {error}") from error
        raise UserError(
            f"model.path={path}: there is no such folder, the model is not in the cache, and the hub cannot be reached "
            "or has no such model; set model.path to a local folder, or connect to the network."
        ) from error


def embedding_rows(config: PretrainedConfig) -> int | None:
    """Return the number of rows of a model's embedding; None if its config does not say."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash (16 hexadecimal digits) of everything that affects a tokenizer's ids and rendered chats."""
    vocabulary: Any = sorted(tokenizer.get_vocab().items(), key=str)
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        vocabulary = {key: value for key, value in backend.items() if key not in CALL_STATE}
    file = getattr(tokenizer, "vocab_file", None)
    content = Path(file).read_bytes() if file and Path(file).is_file() else b""
    return fingerprint(
        vocabulary,
        str(tokenizer.special_tokens_map),
        str(tokenizer.chat_template),
        tokenizer.model_max_length,
        hashlib.sha256(content).hexdigest(),
    )
