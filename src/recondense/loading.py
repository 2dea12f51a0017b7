"""A model in: a Hugging Face causal LM and its tokenizer, from the hub or from a local folder; safetensors only."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recondense import families, processes, quantized
from recondense.config import ModelConfig
from recondense.progress import progress

log = logging.getLogger(__name__)

HASH_BYTES = 1 << 26
NOT_COMPUTED = ("_name_or_path", "architectures", "transformers_version")  # of a config: what changes no result


def load(settings: ModelConfig, path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer; weights stored in MXFP4 or FP8 are dequantised.

    Args:
        settings: dtype, device, attention and experts implementation.
        path: hub id or folder.

    Raises:
        ValueError: weights that are not there, or not safetensors.
        ConnectionError: a hub id that is in no cache while the hub cannot be reached.
    """
    common = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        values, _ = PretrainedConfig.get_config_dict(path, revision=settings.revision)
        families.register_compressed(values.get("model_type", ""))
        dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
        with progress(f"loading {path}"), quantized.dequantising(values, dtype) as arguments:
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
            raise ValueError(f"model.path={path}: {error}") from error
        raise ConnectionError(
            f"model.path={path}: there is no such folder, and the hub cannot be reached or has no such model, nor is "
            "it in the cache; give model.path a local folder, or connect to the network."
        ) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # made up for a folder that has none
        raise ValueError(f"model.path={path}: has no tokenizer; set model.tokenizer to a folder that has one")
    device = device_of(settings)
    # auto never takes batched_mm, some 60 times slower on a CPU
    model.set_experts_implementation("grouped_mm" if settings.experts == "auto" else settings.experts)
    families.without_router_loss(model)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps the method
    return model.eval(), tokenizer


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
        parameters = dict(model.named_parameters())  # tied ones once
        buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
        weights = parameters | {name: model.get_buffer(name) for name in buffers}
        for name, parameter in sorted(weights.items()):
            content = xxhash.xxh3_128()
            flat = parameter.detach().reshape(-1).view(torch.uint8)
            for piece in flat.split(HASH_BYTES):
                content.update(piece.cpu().numpy().data)
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {content.hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
