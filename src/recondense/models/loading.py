"""LOAD: a Hugging Face causal LM and its tokenizer, from the hub or a local folder; safetensors only."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recondense import processes
from recondense.config.checks import ADAPTER, HOLDS_ADAPTER
from recondense.config.schema import ModelConfig, from_dict
from recondense.errors import ConfigError, UserError
from recondense.models import decoder, headers, model_classes, quantized, shard_reader
from recondense.models.checkpoint_checks import require_checkpoint
from recondense.models.config_checks import OUTPUT_FORM
from recondense.models.differences import missing_weights, shown
from recondense.models.layer_store import layer_store, set_layer_store
from recondense.models.library_errors import MORE_MEMORY, library_calls, reason_of, without_warnings
from recondense.models.model_files import keep_history, model_file
from recondense.models.streaming import Streamed
from recondense.models.tokenizers import hub_files, warn_of_other_ids
from recondense.progress import progress

log = logging.getLogger(__name__)

HASH_BYTES = 1 << 26
IRRELEVANT = ("_name_or_path", "architectures", "transformers_version")  # config entries that do not affect results


def load(
    path: str | Path, settings: ModelConfig | None = None, offload_folder: Path | None = None, **changes: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer. Weights stored in MXFP4 or FP8 are dequantized.

    Args:
        path: a hub id or a folder.
        settings: all settings of the model, such as dtype, device, and the implementations of attention and experts.
            None uses the defaults of conf/model; attention is then eager in a family that does not support sdpa, unless
            `changes` sets it.
        offload_folder: if given, the model is streamed: each decoder layer is read when it is used, and the blocks that
            `apply` makes are written to this folder. None loads the entire model.
        changes: single settings as keyword arguments: revision, tokenizer, dtype, device, attention, experts or
            trust_remote_code.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        UserError: a setting does not exist; the family does not support the attention implementation; the weights are
            missing, do not match the config, or are not safetensors; the folder contains an adapter; or the model is
            not in the cache and the hub cannot be reached.

    Examples:
        >>> model, tokenizer = rc.load(folder, dtype="bfloat16")
        >>> model.dtype
        torch.bfloat16
    """
    by_family = settings is None and "attention" not in changes
    settings = settings or ModelConfig()
    if changes:
        settings = from_dict({"model": {**asdict(settings), **changes}}).model
    checkpoint = require_checkpoint(path, settings)
    warn_of_other_ids(checkpoint.tokenizer, path, settings)
    return load_model(path, settings, offload_folder, attention_by_family=by_family), checkpoint.tokenizer


def load_model(
    path: str | Path,
    settings: ModelConfig,
    offload_folder: Path | None = None,
    *,
    attention_by_family: bool = False,
    setting: str = "model.path",
) -> PreTrainedModel:
    """Load a causal LM without its tokenizer. Its files are compared with its config before a weight is read.

    Args:
        path, settings, offload_folder: as for `load`.
        attention_by_family: use eager attention if the family does not support that of the settings.
        setting: the setting that names the model, for messages.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: as for `load`.
    """
    attention, what = None if attention_by_family else settings.attention, f"{setting}={path}"
    if model_file(path, ADAPTER, settings.revision) is not None:
        raise UserError(f"{what}: {HOLDS_ADAPTER}")
    with progress(f"loading {path}"), hub_files(what, path, replace(settings, tokenizer=None)):
        model = _load_model(settings, attention, path, offload_folder, what)
    # auto never uses batched_mm, which is about 60 times slower on a CPU.
    model.set_experts_implementation("grouped_mm" if settings.experts == "auto" else settings.experts)
    decoder.disable_router_loss(model)
    _correct_generation(model, what)
    keep_history(model, replace(settings, path=str(path)))
    if offload_folder is None:
        device = choose_device(settings)
        with library_calls(f"{what}: it cannot be moved to {device}", MORE_MEMORY):
            model.to(device)
    for parameter in model.parameters():
        parameter.data = shard_reader.align(parameter.data)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _load_model(
    settings: ModelConfig, attention: str | None, path: str | Path, offload_folder: Path | None, what: str
) -> Any:
    """Load the model in its dtype, on the CPU unless it is streamed.

    Args:
        attention: the attention that the caller named. None uses that of the settings, or eager if the family lacks it.
        what: the setting that names the model with its value, for messages.
    """
    cannot_load = f"{what}: transformers cannot load the model"
    with library_calls(cannot_load):
        values, _ = PretrainedConfig.get_config_dict(path, revision=settings.revision)
    remote = not model_classes.is_known(values.get("model_type")) and settings.trust_remote_code
    if not remote and not _has_attention(values, settings):
        if attention is not None:
            lacking = f"model_type {values['model_type']} lacks it; use attention=eager"
            raise UserError(f"{what}: attention={attention}: {lacking}")
        settings = replace(settings, attention="eager")
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with quantized.loading_arguments(values, dtype) as arguments, _checked_loading(values, offload_folder, what):
        if offload_folder is not None:
            arguments["device_map"] = {"": choose_device(settings)}
        with library_calls(cannot_load, MORE_MEMORY):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                attn_implementation=settings.attention,
                use_safetensors=True,
                output_loading_info=True,
                revision=settings.revision,
                trust_remote_code=remote,
                **OUTPUT_FORM,
                **arguments,
            )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers initialized them at random
        raise UserError(f"{what}: {missing_weights(missing, info['unexpected_keys'])}")
    if (method := quantized.method_of(values)) is not None:
        quantized.finish_dequantization(model, arguments["dtype"])
        log.info("%s is stored in %s: dequantized to %s", path, method, arguments["dtype"])
    return model


def _correct_generation(model: PreTrainedModel, what: str) -> None:
    """Replace generation settings that contradict each other, which transformers reads but refuses to write."""
    if not model.can_generate():
        return
    try:
        with without_warnings():
            model.generation_config.validate(strict=True)
    except ValueError as error:
        log.warning("%s: its generation_config.json is replaced by the defaults: %s", what, reason_of(error))
        model.generation_config = GenerationConfig.from_model_config(model.config)


def _has_attention(values: Mapping[str, Any], settings: ModelConfig) -> bool:
    """Return whether the model of a config.json supports the settings' attention; True if it cannot be known before."""
    model_type = values.get("model_type")
    if not model_classes.is_known(model_type):  # transformers says so when it loads the model
        return True
    return model_classes.has_attention(AutoConfig.for_model(str(model_type)), settings.attention)


@contextmanager
def _checked_loading(values: Mapping[str, Any], offload_folder: Path | None, what: str) -> Iterator[None]:
    """Make transformers check the headers of the files before it reads weights, inside the context.

    Args:
        values: the contents of the model's config.json.
        offload_folder: as for `load`. For a streamed model, transformers loads only the weights outside the decoder
            layers.
        what: the setting that names the model with its value, for messages.
    """
    load_all = PreTrainedModel._load_pretrained_model
    reading = partial(quantized.fp8_by_blocks, values)

    def load_streamed(model: Any, files: Any, load_config: Any, folder: Path) -> Any:
        inside = decoder.layers_prefix()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.startswith(inside):
                tensor._is_hf_initialized = True  # otherwise transformers would initialize it at random
        store = Streamed(model, files, load_config, folder, reading)
        set_layer_store(model, store)
        return store.load_outside_layers()

    def load_checked(model: Any, state_dict: Any, files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        comparison = headers.compare(model, files, quantized.method_of(values))
        if comparison.problems:
            raise ConfigError(f"{what}: {problem}" for problem in comparison.problems)
        _warn(what, files, comparison.unexpected)
        if offload_folder is not None:
            return load_streamed(model, files, load_config, offload_folder)
        with library_calls(f"{what}: the weights cannot be read", MORE_MEMORY):
            return load_all(model, state_dict, files, load_config, *args, **kwargs)

    PreTrainedModel._load_pretrained_model = staticmethod(load_checked)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(load_all)  # type: ignore[method-assign]


def _warn(what: str, files: Any, ignored: Sequence[str]) -> None:
    """Log what is odd about a checkpoint that can be loaded.

    Args:
        what: the setting that names the model with its value.
        files: its safetensors files, or one of them.
        ignored: names of the weights that are no part of the model.
    """
    if ignored:
        log.warning("%s: ignores %d weights that the model does not have: %s", what, len(ignored), shown(ignored))
    first = files if isinstance(files, str | Path) else next(iter(files))
    for note in headers.notes(Path(first).parent):
        log.warning("%s: %s", what, note)


def choose_device(settings: ModelConfig) -> torch.device:
    """Return the device that the settings name. With several processes, each uses the GPU of its local rank.

    auto is a GPU if there is one, otherwise the CPU.
    """
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if processes.world_size() > 1:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda:0" if settings.device == "auto" else settings.device)


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return a hash (16 hexadecimal digits) of the config and of every weight's name, dtype, shape and bytes.

    Weights are parameters and persistent buffers, because correction biases of routers are buffers.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in IRRELEVANT}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    with progress("hashing weights"):
        lines: dict[str, str] = {}
        for layer, module in enumerate(decoder.decoder_layers(model)):
            with layer_store(model).resident(layer):
                lines |= {decoder.layer_prefix(layer) + name: line for name, line in _digests(module).items()}
        inside = decoder.layers_prefix()
        lines |= _digests(model, lambda name: not name.startswith(inside))
        for name, line in sorted(lines.items()):
            digest.update(f"{name} {line}\n".encode())
    return digest.hexdigest()[:16]


def _digests(module: nn.Module, selected: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """Return the dtype, shape and hash of each weight with a selected name; tied weights are listed once."""
    parameters = dict(module.named_parameters())
    buffers = {name for name, _ in module.named_buffers()} & module.state_dict().keys()
    digests = {}
    for name, tensor in (parameters | {name: module.get_buffer(name) for name in buffers}).items():
        if selected(name):
            content = xxhash.xxh3_128()
            for piece in tensor.detach().reshape(-1).view(torch.uint8).split(HASH_BYTES):
                content.update(piece.cpu().numpy().data)
            digests[name] = f"{tensor.dtype} {tuple(tensor.shape)} {content.hexdigest()}"
    return digests
