"""Dequantize published weights (gpt-oss: MXFP4, DeepSeek-V3: FP8), and count their bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import FineGrainedFP8Config, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.utils.quantization_config import Mxfp4Config

from recondense.config.problems import Problem
from recondense.errors import UserError
from recondense.models.parameters import weights_bytes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class StoredWeights:
    """The quantized weights of a model on disk.

    Args:
        method: "mxfp4" or "fp8".
        num_bytes: size of its safetensors files.
    """

    method: str
    num_bytes: int


def method_of(config: Mapping[str, Any]) -> str | None:
    """Return the quantization method in a config.json ("mxfp4", "fp8" or another); None if there is none."""
    stored = config.get("quantization_config")
    return str(stored.get("quant_method") or "a format without a name") if stored else None


def check(config: Mapping[str, Any], setting: str = "model.path", path: str | None = None) -> list[Problem]:
    """Return a problem if the quantized weights of a config.json cannot be read.

    Args:
        config: the contents of config.json.
        setting: the setting that names the model.
        path: the value of the setting.
    """
    method = method_of(config)
    blocks = config["quantization_config"].get("weight_block_size") if method == "fp8" else None
    if method == "fp8" and not blocks:
        method = "fp8 without weight_block_size"
    elif blocks and not (isinstance(blocks, list | tuple) and len(blocks) == 2 and all(size > 0 for size in blocks)):
        method = f"fp8 with weight_block_size={blocks}"
    if method in (None, "mxfp4", "fp8"):
        return []
    text = (
        f"its weights are stored in {method}, which is not supported (mxfp4 and fp8 with weight_block_size are); use "
        "the model in bf16, fp16 or fp32, or dequantize it first with the tool that quantized it."
    )
    return [Problem(setting, text, path)]


def weight_name(key: str, method: str | None) -> str:
    """Return the name that a stored tensor would have in an unquantized checkpoint."""
    return key.removesuffix("_blocks") if method == "mxfp4" else key


def weight_shape(key: str, shape: tuple[int, ...], method: str | None) -> tuple[int, ...]:
    """Return the shape that a stored tensor has in the model. FP8 keeps it; MXFP4 packs two numbers into a byte.

    Args:
        key: the tensor's name.
        shape: its shape; of packed experts (E, O, I / 32, 16), which become (E, I, O).
        method: the quantization method, as returned by `method_of`.
    """
    if method != "mxfp4" or not key.endswith("_blocks") or len(shape) != 4:
        return shape
    experts, rows, groups, size = shape
    return (experts, 2 * groups * size, rows)


def missing_scales(key: str, dtype: str, method: str | None, keys: Collection[str]) -> list[str]:
    """Return the name of a quantized tensor's scales if the checkpoint lacks them; otherwise an empty list.

    Args:
        key: the tensor's name.
        dtype: its dtype, as named by safetensors.
        method: the quantization method, as returned by `method_of`.
        keys: the names of all tensors of the checkpoint.
    """
    names: list[str] = []
    if method == "mxfp4" and key.endswith("_blocks"):
        names = [f"{key.removesuffix('_blocks')}_scales"]
    elif method == "fp8" and dtype in ("F8_E4M3", "F8_E5M2"):  # transformers would use the numbers without scales
        stem = key.removesuffix("weight")
        names = [f"{key}_scale_inv", f"{stem}scale", f"{stem}qscale_weight"]
    return [] if any(name in keys for name in names) else names[:1]


@contextmanager
def loading_arguments(config: Mapping[str, Any], dtype: torch.dtype | str) -> Iterator[dict[str, Any]]:
    """Yield arguments with which `from_pretrained` dequantizes weights inside the context.

    Args:
        config: the contents of a model's config.json.
        dtype: the dtype of the loaded weights; "auto" is the config's dtype, or bf16 if that has fewer bits.

    Yields:
        `dtype`, and `quantization_config` if the weights are quantized.

    Raises:
        UserError: the quantization method is not supported.
    """
    if problems := check(config):
        raise UserError(problems[0])
    method = method_of(config)
    if method is None:
        yield {"dtype": dtype}
        return
    if isinstance(dtype, str):
        name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
        dtype = {"float32": torch.float32, "float16": torch.float16}.get(name, torch.bfloat16)
    if method == "mxfp4":
        yield {"dtype": dtype, "quantization_config": Mxfp4Config(dequantize=True)}
        return
    fp8 = FineGrainedFP8Config(**{**config["quantization_config"], "dequantize": True})
    with fp8_by_blocks(config):
        yield {"dtype": dtype, "quantization_config": fp8}


@contextmanager
def fp8_by_blocks(config: Mapping[str, Any]) -> Iterator[None]:
    """Make transformers dequantize FP8 weights with the config's block size inside the context."""
    if method_of(config) != "fp8":
        yield
        return
    original = Fp8Dequantize._dequantize_one
    Fp8Dequantize._dequantize_one = _dequantize_by_blocks(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = original  # type: ignore[method-assign]


@torch.no_grad()
def finish_dequantization(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Turn a dequantized model into an ordinary one, with a single dtype and without quantization when it is saved.

    After loading, tensors that were never quantized have the file's dtype, and transformers would quantize the model
    again when saving it.

    Args:
        model: the loaded model.
        dtype: the requested dtype; tensors that transformers keeps in fp32 are not changed.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype not in (dtype, torch.float32):
            tensor.data = tensor.data.to(dtype)
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__["_weight_conversions"] = get_model_conversion_mapping(model)


def _dequantize_by_blocks(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return transformers' FP8 dequantization, changed to use the config's block size.

    transformers 5.17 to 5.23 divide a weight evenly by its number of scales. If the last block is smaller, that gives
    wrong values or an error (576 rows in blocks of 128: kv_a_proj_with_mqa of DeepSeek-V3).
    """

    def dequantize(
        op: Fp8Dequantize, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Compute W = q ⊙ (scale of its block): (…, O, I) from (…, O, I) and (…, ⌈O/o⌉, ⌈I/i⌉), blocks of (o, i)."""
        rows, columns = quantized.shape[-2:]
        high, wide = op.hf_quantizer.quantization_config.weight_block_size
        fp8 = quantized.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        if not fp8 or scales.dtype == torch.uint8 or scales.shape[-2:] != (-(-rows // high), -(-columns // wide)):
            return original(op, quantized, scales, output_dtype=output_dtype)  # not stored in the config's blocks
        expanded = scales.float().repeat_interleave(high, dim=-2).narrow(-2, 0, rows)
        expanded = expanded.repeat_interleave(wide, dim=-1).narrow(-1, 0, columns)
        return (quantized.float() * expanded).to(output_dtype or torch.bfloat16)

    return dequantize


def stored_weights(path: str | Path, revision: str | None = None) -> StoredWeights | None:
    """Return the method and size of a model's quantized weights; None if unquantized, or the files are not found.

    Args:
        path: a folder, or a hub id whose files are in the cache.
        revision: the revision on the hub.
    """
    config = _file(path, "config.json", revision)
    method = None if config is None else method_of(json.loads(config.read_text(encoding="utf-8")))
    num_bytes = None if method is None else bytes_on_disk(path, revision)
    return None if method is None or num_bytes is None else StoredWeights(method, num_bytes)


def bytes_on_disk(path: str | Path, revision: str | None = None) -> int | None:
    """Return the total size in bytes of a model's safetensors files; None if they cannot be found.

    Args:
        path: a folder, or a hub id whose files are in the cache.
        revision: the revision on the hub.
    """
    index = _file(path, INDEX, revision)
    names = [SINGLE]
    if index is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files = [_file(path, name, revision) for name in names]
    sizes = [file.stat().st_size for file in files if file is not None]
    return sum(sizes) if len(sizes) == len(names) else None


def _file(path: str | Path, name: str, revision: str | None) -> Path | None:
    """Return the path of a model's file, in its folder or in the hub's cache; None if it is not there."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    cached = try_to_load_from_cache(str(path), name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


BytesOf = Callable[[nn.Module], int]
MXFP4_BITS = 4 + 8 / 32  # bits per number, with an exponent for every 32 numbers


def quantization(config: PretrainedConfig) -> dict[str, Any]:
    """Return the quantization settings of a config; empty if it has none."""
    settings = getattr(config, "quantization_config", None) or {}
    return dict(settings) if isinstance(settings, Mapping) else dict(settings.to_dict())


def byte_counter(model: PreTrainedModel, quantized: Mapping[str, Any]) -> BytesOf:
    """Return a function that counts the bytes of a part of a model as stored in its checkpoint.

    FP8 stores one byte per weight and 4 bytes per block, in the experts and in all Linear layers except the head. MXFP4
    stores 4 bits per weight and one byte per 32 weights, in the experts. All other weights are stored in their dtype.

    Args:
        model: the model, with or without weights.
        quantized: the quantization settings of its config; empty if it is not quantized.

    Raises:
        UserError: the quantization method is neither FP8 nor MXFP4.
    """
    if not quantized:
        return weights_bytes
    method = quantized.get("quant_method")
    if method not in ("fp8", "mxfp4"):
        raise UserError(
            f"model.path: the checkpoint is quantized with {method}, whose size is not known (only fp8 and mxfp4 are); "
            "use model.dtype=bfloat16 to count the dequantized weights"
        )
    head = model.get_output_embeddings()
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module is not head}

    def count(part: nn.Module) -> int:
        size = weights_bytes(part)
        for parameter in part.parameters():
            stacked = parameter.ndim == 3  # of all experts
            if method == "mxfp4" and stacked:
                size += round(parameter.numel() * MXFP4_BITS / 8) - parameter.nbytes
            elif method == "fp8" and (stacked or id(parameter) in linear):
                size += _fp8_bytes(parameter, quantized.get("weight_block_size")) - parameter.nbytes
        return size

    return count


def _fp8_bytes(weight: torch.Tensor, block_size: Sequence[int] | None) -> int:
    """Return the bytes of a weight and its scales; without a block size there is one scale per matrix."""
    *stack, rows, columns = weight.shape
    high, wide = block_size or (rows, columns)
    return weight.numel() + 4 * math.prod(stack) * -(-rows // high) * -(-columns // wide)
