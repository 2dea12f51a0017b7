"""Load a model's tokenizer, without its weights."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from recondense.config.schema import ModelConfig
from recondense.errors import UserError
from recondense.files import fingerprint
from recondense.models import model_classes
from recondense.models.library_errors import GIT_LFS, damage, library_calls, read_json, without_warnings
from recondense.models.model_files import cached_model_file, model_file
from recondense.offline import hub_access

log = logging.getLogger(__name__)

# Files of a tokenizer.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("tokenizer.model", "tiktoken.model", "merges.txt", "chat_template.jinja"),
)
PACKAGES = {"tokenizer.model": "sentencepiece", "tiktoken.model": "tiktoken"}  # what reads a file, by its name
KIND = re.compile(rb'"model"\s*:\s*\{\s*"type"\s*:\s*"(\w+)"')  # of the algorithm in tokenizer.json
SAMPLE = "A tokenizer is tried: 3 + 4 = 7, naïve cafés,\n\n  tabs\tand 数学 🙂"
CALL_STATE = ("truncation", "padding")  # entries of a fast tokenizer that depend on its last call


def load_tokenizer(path: str | Path, settings: ModelConfig, setting: str = "model.path") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or the one that the settings name.

    Args:
        path: the model's hub id or folder.
        settings: tokenizer, revision and trust_remote_code are used.
        setting: the setting that names the model, for messages.

    Raises:
        UserError: there is no tokenizer, its files are damaged, or a package that it needs is missing.
    """
    name, source = tokenizer_setting(path, settings, setting)
    where = f"{name}={source}"
    # The revision is that of the model's repository, not of another one with the tokenizer.
    revision = settings.revision if settings.tokenizer is None else None
    with hub_files(where, path, settings):
        try:
            for text in _missing_packages(source, revision):
                raise UserError(f"{where}: {text}")
            with library_calls(f"{where}: transformers cannot read the tokenizer"):
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    source,
                    revision=revision,
                    trust_remote_code=settings.trust_remote_code,
                    **_local_config(source, revision),
                )
        except UserError as error:
            for reason in damaged_files(source, revision):
                raise UserError(f"{where}: {reason}") from error
            raise
    if GIT_LFS.decode() in str(tokenizer.chat_template):  # transformers takes any text for a template
        raise UserError(f"{where}: the chat template is a Git LFS pointer, not the file itself; run `git lfs pull`")
    if problem := _wrong_class(tokenizer, source, revision):
        raise UserError(f"{where}: {problem}")
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # transformers' default without a tokenizer
        raise UserError(f"{where}: has no tokenizer; set model.tokenizer to a folder or hub id that has one")
    return tokenizer


def _wrong_class(tokenizer: PreTrainedTokenizerBase, source: str | Path, revision: str | None) -> str:
    """Return why a tokenizer's class is not that of its tokenizer.json; empty if it is, or if that cannot be known."""
    file = cached_model_file(source, "tokenizer.json", revision)
    stored = None if file is None else KIND.search(file.read_bytes())
    if stored is None or not tokenizer.is_fast:
        return ""
    kind = type(tokenizer.backend_tokenizer.model).__name__  # type: ignore[attr-defined]
    if kind == stored[1].decode():
        return ""
    return (
        f"tokenizer_config.json names the class {type(tokenizer).__name__}, which is a {kind} tokenizer, but "
        f"tokenizer.json holds a {stored[1].decode()} tokenizer; correct tokenizer_class, or use the files of one model"
    )


def warn_of_other_ids(
    tokenizer: PreTrainedTokenizerBase, path: str | Path, settings: ModelConfig, texts: Sequence[str] = ()
) -> None:
    """Log a line if a tokenizer, in the class that transformers has chosen, gives other ids than its tokenizer.json.

    Args:
        tokenizer: the tokenizer that `load_tokenizer` has returned.
        path, settings: the arguments of `load_tokenizer`.
        texts: texts to compare, in addition to a sample.
    """
    name, source = tokenizer_setting(path, settings)
    file = cached_model_file(source, "tokenizer.json", settings.revision if settings.tokenizer is None else None)
    if file is None:
        return
    try:
        with library_calls("tokenizer.json cannot be read"):
            stored = Tokenizer.from_file(str(file))
    except UserError:  # transformers reads only a part of it
        return
    stored.no_truncation()
    stored.no_padding()
    stored.encode_special_tokens = tokenizer.split_special_tokens
    for text in (SAMPLE, *texts):
        actual = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        expected = stored.encode(text, add_special_tokens=False).ids
        if actual != expected:
            log.warning(
                "%s=%s: transformers loads the tokenizer as a %s, which gives other ids than its tokenizer.json: for "
                "%r %d that begin with %s instead of %d that begin with %s; if this is not meant, correct "
                "tokenizer_class in tokenizer_config.json",
                *(name, source, type(tokenizer).__name__, text[:60]),
                *(len(actual), actual[:5], len(expected), expected[:5]),
            )
            return


def tokenizer_setting(path: str | Path, settings: ModelConfig, setting: str = "model.path") -> tuple[str, str]:
    """Return the setting that names the tokenizer, and its value.

    Args:
        path: the model's hub id or folder.
        settings: settings of the model.
        setting: the setting that names the model.
    """
    return (setting, str(path)) if settings.tokenizer is None else ("model.tokenizer", settings.tokenizer)


def _local_config(source: str | Path, revision: str | None) -> dict[str, Any]:
    """Return the argument with the config for AutoTokenizer, which would run remote code for a known model_type."""
    file = model_file(source, "config.json", revision)
    if file is None or damage(file):
        return {}
    try:
        model_type = read_json(file).get("model_type")
        if model_classes.is_known(model_type):
            with library_calls("transformers cannot read config.json"), without_warnings():
                return {"config": AutoConfig.from_pretrained(file.parent, trust_remote_code=False)}
    except UserError:  # transformers says so, if the tokenizer depends on it
        pass
    return {}


def damaged_files(source: str | Path, revision: str | None) -> Iterator[str]:
    """Yield a sentence for each damaged file of a tokenizer; files of the hub that are not in the cache are skipped.

    They say why a tokenizer cannot be loaded. One that can be loaded does not need the damaged files.

    Args:
        source: folder or hub id.
        revision: the revision on the hub.
    """
    for name in FILES:
        file = cached_model_file(source, name, revision) or Path(source) / name
        if not (file.is_file() or file.is_symlink()):
            continue
        try:
            if name.endswith(".json"):
                read_json(file)
            elif problem := damage(file):
                yield problem
        except UserError as error:
            yield str(error)


def _missing_packages(source: str | Path, revision: str | None) -> Iterator[str]:
    """Yield the package that lacks if a tokenizer is stored only in another library's format."""
    if any(model_file(source, name, revision) is not None for name in ("tokenizer.json", "vocab.json")):
        return
    for name, package in PACKAGES.items():
        if model_file(source, name, revision) is not None and importlib.util.find_spec(package) is None:
            yield (
                f"the tokenizer is stored in {name}, which takes the package {package}; `pip install {package}`, or "
                "save the tokenizer as tokenizer.json on a machine that has it"
            )


@contextmanager
def hub_files(what: str, path: str | Path, settings: ModelConfig) -> Iterator[None]:
    """Let libraries read a model's files inside the context, from the hub if it can be reached, or the cache if not.

    Args:
        what: the setting that names the model with its value, for messages.
        path: the model's hub id or folder.
        settings: settings of the model.

    Raises:
        UserError: a library failed because it found no such model.
    """
    # Otherwise each look-up on an unreachable hub is repeated for 20 s, even of a file that is in the cache.
    local = Path(path).is_dir() and (settings.tokenizer is None or Path(settings.tokenizer).is_dir())
    try:
        with nullcontext() if local else hub_access():
            yield
    except UserError as error:
        if local or not isinstance(error.__cause__, OSError | HFValidationError):
            raise
        raise UserError(
            f"{what}: there is no such folder, the model is not in the cache, and the hub cannot be reached or has no "
            "such model; give a local folder, or connect to the network."
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
