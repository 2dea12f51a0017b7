"""Load an exported folder as its users will: by transformers' Auto classes, with the folder's code instead of ours."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    dynamic_module_utils,
)
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from recondense.errors import UserError
from recondense.models import decoder
from recondense.models.library_errors import library_calls
from recondense.models.shard_reader import no_progress_bars
from recondense.models.tokenizers import SAMPLE

MODULES = ".modules"  # a subfolder of the exported folder, while code from the folder is loaded


@contextmanager
def only_the_folders_code(folder: Path) -> Iterator[None]:
    """Let transformers load a folder as in a process that has never loaded anything else, inside the context.

    Classes that recondense has registered are hidden, because they would be used instead of the folder's own. Modules
    that the folder's code makes, and classes that it registers, are forgotten afterwards. What was loaded must not be
    used after the context.

    Args:
        folder: the folder. Until the end of the context, it also holds a copy of its code.
    """
    mappings: tuple[Any, ...] = (CONFIG_MAPPING, MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    registered = [mapping._extra_content for mapping in mappings]
    cache, paths, modules = dynamic_module_utils.HF_MODULES_CACHE, list(sys.path), _take_dynamic_modules()
    for mapping in mappings:
        mapping._extra_content = {}
    dynamic_module_utils.HF_MODULES_CACHE = str(folder / MODULES)
    try:
        yield
    finally:
        dynamic_module_utils.HF_MODULES_CACHE = cache
        for mapping, content in zip(mappings, registered, strict=True):
            mapping._extra_content = content
        _take_dynamic_modules()
        sys.modules.update(modules)
        sys.path[:] = paths
        shutil.rmtree(folder / MODULES, ignore_errors=True)


def _take_dynamic_modules() -> dict[str, Any]:
    """Remove the modules that transformers has made from code in folders, and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME]
    return {name: sys.modules.pop(name) for name in names}


def load_outline(folder: Path) -> PreTrainedModel:
    """Make the model that a folder describes on the meta device, without weights."""
    trusted = _has_code(folder)
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trusted)
    with torch.device("meta"):
        outline: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    return outline


def load_like(folder: Path, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a folder to the device of another model, and let it compute with the same kernels.

    Returns:
        The model in evaluation mode, and what transformers says about its loading.
    """
    device = decoder.device(model)
    with no_progress_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype="auto",
            trust_remote_code=_has_code(folder),
            attn_implementation=model.config._attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **({} if device.type == "cpu" else {"device_map": {"": device}}),
        )
    reloaded, info = loaded
    reloaded.set_experts_implementation(model.get_experts_implementation())
    _round_frequencies(reloaded, model)
    return reloaded.eval(), info


def _round_frequencies(reloaded: PreTrainedModel, model: PreTrainedModel) -> None:
    """Convert the rotary frequencies, which no file has, if those of the model differ from them in their dtype only.

    They do after `model.bfloat16()`.
    """
    buffers = dict(model.named_buffers())
    for name, buffer in reloaded.named_buffers():
        other = buffers.get(name)
        if other is not None and other.dtype != buffer.dtype and torch.equal(buffer.to(other.dtype), other):
            holder, _, leaf = name.rpartition(".")
            reloaded.get_submodule(holder)._buffers[leaf] = other


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    Raises:
        UserError: transformers cannot load it.
    """
    with library_calls("transformers cannot load the tokenizer that it has saved"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=_has_code(folder)
        )
    return tokenizer


def tokenizer_problem(tokenizer: PreTrainedTokenizerBase, folder: Path, texts: Sequence[str] = ()) -> str:
    """Load the tokenizer of a folder with transformers, and compare the ids that it gives with those of the original.

    Args:
        tokenizer: the tokenizer that was saved to the folder.
        folder: the folder.
        texts: texts to compare, in addition to a sample and the special tokens.

    Returns:
        How they differ and what to do, as a sentence; empty if they do not.
    """
    remedy = "Use one whose class fits its files (model.tokenizer=FOLDER), or set export.verify=shapes"
    with only_the_folders_code(folder):
        try:
            reloaded = load_tokenizer(folder)
        except UserError as error:
            return f"{error}. {remedy}"
        for text in (SAMPLE, *tokenizer.all_special_tokens, *texts):
            expected, actual = (one(text, verbose=False).input_ids for one in (tokenizer, reloaded))
            if expected != actual:
                return (
                    f"transformers saves the tokenizer, a {type(tokenizer).__name__}, and loads it as another one: for "
                    f"{text[:60]!r} it gives {len(actual)} ids that begin with {actual[:5]}, instead of "
                    f"{len(expected)} that begin with {expected[:5]}. {remedy}"
                )
    return ""


def _has_code(folder: Path) -> bool:
    return any(folder.glob("*.py"))  # that of the model, or of a tokenizer
