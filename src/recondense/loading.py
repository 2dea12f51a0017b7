"""A model in: a Hugging Face causal LM and its tokenizer, from the hub or from a local folder; safetensors only."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from recondense import families, paging, processes, quantized
from recondense.config import ModelConfig
from recondense.errors import UserError
from recondense.progress import progress

log = logging.getLogger(__name__)

HASH_BYTES = 1 << 26
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
        UserError: weights that are not there, or not safetensors.
        UserError: a hub id that is in no cache while the hub cannot be reached.
    """
    common = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        values, _ = PretrainedConfig.get_config_dict(path, revision=settings.revision)
        families.register_compressed(values.get("model_type", ""))
        dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
        unread = nullcontext() if pages is None else _unread(pages, partial(quantized.reading, values))
        with progress(f"loading {path}"), quantized.dequantising(values, dtype) as arguments, unread:
            if pages is not None:
                arguments["device_map"] = {"": device_of(settings)}
            model = AutoModelForCausalLM.from_pretrained(
                path,
                attn_implementation=settings.attention,
                use_safetensors=True,
                **arguments,
                **common,
            )
            if (method := quantized.method_of(values)) is not None:
                quantized.settle(model, arguments["dtype"])
                log.info("%s is stored in %s: dequantised to %s", path, method, arguments["dtype"])
            if settings.tokenizer is not None:
                common["revision"] = None  # that of the model says nothing of another repository
            tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer or path, **common)
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
    families.without_router_loss(model)
    if pages is None:
        model.to(device)  # type: ignore[arg-type]  # transformers wraps the method
    for parameter in model.parameters():
        parameter.data = paging.aligned(parameter.data)
    return model.eval(), tokenizer


@contextmanager
def _unread(pages: Path, reading: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, transformers loads what is outside the decoder layers; those get pages in place of weights."""
    own = PreTrainedModel._load_pretrained_model

    def load_rest(model: Any, state_dict: Any, files: Any, load_config: Any, *_: Any, **__: Any) -> Any:
        inside = families.layers_prefix()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.startswith(inside):
                tensor._is_hf_initialized = True  # nothing to draw at random
        info, index = paging.Pages(model, files, load_config, pages, reading).load_the_rest(model)
        info.missing_keys = {name for name in info.missing_keys if not name.startswith(inside)}
        return info, index

    PreTrainedModel._load_pretrained_model = staticmethod(load_rest)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(own)  # type: ignore[method-assign]


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
        for layer, module in enumerate(families.decoder_layers(model)):
            with paging.resident(model, layer):
                found |= {families.layer_prefix(layer) + name: line for name, line in _digests(module).items()}
        inside = families.layers_prefix()
        found |= _digests(model, lambda name: not name.startswith(inside))
        for name, line in sorted(found.items()):
            digest.update(f"{name} {line}\n".encode())
    return digest.hexdigest()[:16]


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
