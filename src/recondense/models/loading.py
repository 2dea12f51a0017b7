"""A model in: a Hugging Face causal LM and its tokenizer, from the hub or from a local folder; safetensors only."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recondense import processes
from recondense.config.checks import ADAPTER, HOLDS_ADAPTER
from recondense.config.schema import ModelConfig
from recondense.errors import UserError
from recondense.files import fingerprint
from recondense.models import classes, decoder, headers, quantized, shard_reader, streaming
from recondense.models.model_files import model_file
from recondense.progress import progress

log = logging.getLogger(__name__)

HASH_BYTES = 1 << 26
OF_THE_LAST_CALL = ("truncation", "padding")  # of a fast tokenizer
NOT_COMPUTED = ("_name_or_path", "architectures", "transformers_version")  # of a config: what changes no result


def load(
    settings: ModelConfig, path: str | Path, pages: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer; weights stored in MXFP4 or FP8 are dequantised.

    Args:
        settings: dtype, device, attention and experts implementation.
        path: hub id or folder.
        pages: decoder layers are read when they are used, and this folder takes what surgery makes of them.

    Raises:
        UserError: weights that are not there, not those of the config, or not safetensors; an adapter beside them.
        UserError: a hub id that is in no cache while the hub cannot be reached.
    """
    if model_file(path, ADAPTER, settings.revision) is not None:
        raise UserError(f"model.path={path}: {HOLDS_ADAPTER}")
    try:
        with progress(f"loading {path}"):
            model = _model(settings, path, pages)
            tokenizer = AutoTokenizer.from_pretrained(
                settings.tokenizer or path,
                # That of the model says nothing of another repository.
                revision=settings.revision if settings.tokenizer is None else None,
                trust_remote_code=settings.trust_remote_code,
            )
    except (OSError, ValueError, SafetensorError) as error:
        if Path(path).is_dir() or not isinstance(error, OSError):
            raise UserError(f"model.path={path}: {error}") from error
        raise UserError(
            f"model.path={path}: there is no such folder, and the hub cannot be reached or has no such model, nor is "
            "it in the cache; give model.path a local folder, or connect to the network."
        ) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # made up for a folder that has none
        raise UserError(f"model.path={path}: has no tokenizer; set model.tokenizer to a folder that has one")
    device = device_of(settings)
    # auto never takes batched_mm, some 60 times slower on a CPU
    model.set_experts_implementation("grouped_mm" if settings.experts == "auto" else settings.experts)
    decoder.without_router_loss(model)
    if pages is None:
        model.to(device)
    for parameter in model.parameters():
        parameter.data = shard_reader.aligned(parameter.data)
    return model.eval(), tokenizer


def _model(settings: ModelConfig, path: str | Path, pages: Path | None) -> Any:
    """The model as `load` gives it, not yet where it is to compute."""
    values, _ = PretrainedConfig.get_config_dict(path, revision=settings.revision)
    classes.register_compressed(values.get("model_type", ""))
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with quantized.dequantising(values, dtype) as arguments, _checked(values, pages):
        if pages is not None:
            arguments["device_map"] = {"": device_of(settings)}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            attn_implementation=settings.attention,
            use_safetensors=True,
            output_loading_info=True,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            **arguments,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers has drawn them at random
        raise UserError(headers.missing_weights(missing, info["unexpected_keys"]))
    if (method := quantized.method_of(values)) is not None:
        quantized.settle(model, arguments["dtype"])
        log.info("%s is stored in %s: dequantised to %s", path, method, arguments["dtype"])
    return model


@contextmanager
def _checked(values: Mapping[str, Any], pages: Path | None) -> Iterator[None]:
    """Inside, transformers refuses files that are not what the model needs, by their headers, before it reads a weight.

    Args:
        values: config.json of the model.
        pages: transformers loads what is outside the decoder layers; those get pages in place of weights.
    """
    load_all = PreTrainedModel._load_pretrained_model
    reading = partial(quantized.reading, values)

    def load_rest(model: Any, files: Any, load_config: Any, pages: Path) -> Any:
        inside = decoder.layers_prefix()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.startswith(inside):
                tensor._is_hf_initialized = True  # nothing to draw at random
        return streaming.Pages(model, files, load_config, pages, reading).load_the_rest(model)

    def load_checked(model: Any, state_dict: Any, files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        if problem := headers.compare(model, files, quantized.method_of(values)).problem:
            raise UserError(problem)
        if pages is not None:
            return load_rest(model, files, load_config, pages)
        return load_all(model, state_dict, files, load_config, *args, **kwargs)

    PreTrainedModel._load_pretrained_model = staticmethod(load_checked)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(load_all)  # type: ignore[method-assign]


def device_of(settings: ModelConfig) -> torch.device:
    """The device that the settings name; auto is a GPU if there is one: the first, or that of each process's number."""
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if processes.world_size() > 1:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda:0" if settings.device == "auto" else settings.device)


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Sixteen hexadecimal digits of a hash of the config and of every weight's name, type, shape and bytes.

    Weights are parameters and what else a checkpoint has: routers' correction biases are buffers.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in NOT_COMPUTED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    with progress("hashing weights"):
        found: dict[str, str] = {}
        for layer, module in enumerate(decoder.decoder_layers(model)):
            with streaming.resident(model, layer):
                found |= {decoder.layer_prefix(layer) + name: line for name, line in _digests(module).items()}
        inside = decoder.layers_prefix()
        found |= _digests(model, lambda name: not name.startswith(inside))
        for name, line in sorted(found.items()):
            digest.update(f"{name} {line}\n".encode())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sixteen hexadecimal digits of a hash of all that decides a tokenizer's ids and its chats."""
    vocabulary: Any = sorted(tokenizer.get_vocab().items(), key=str)
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        vocabulary = {key: value for key, value in backend.items() if key not in OF_THE_LAST_CALL}
    file = getattr(tokenizer, "vocab_file", None)
    content = Path(file).read_bytes() if file and Path(file).is_file() else b""
    return fingerprint(
        vocabulary,
        str(tokenizer.special_tokens_map),
        str(tokenizer.chat_template),
        tokenizer.model_max_length,
        hashlib.sha256(content).hexdigest(),
    )


def _digests(module: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """Type, shape and hash of every weight by its name, tied ones once."""
    parameters = dict(module.named_parameters())
    buffers = {name for name, _ in module.named_buffers()} & module.state_dict().keys()
    found = {}
    for name, tensor in (parameters | {name: module.get_buffer(name) for name in buffers}).items():
        if wanted(name):
            content = xxhash.xxh3_128()
            for piece in tensor.detach().reshape(-1).view(torch.uint8).split(HASH_BYTES):
                content.update(piece.cpu().numpy().data)
            found[name] = f"{tensor.dtype} {tuple(tensor.shape)} {content.hexdigest()}"
    return found
