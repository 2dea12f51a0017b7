"""Published weights that are stored in fewer bits (gpt-oss: MXFP4, DeepSeek-V3: FP8): read as whole numbers again.

Needs transformers alone: it gives `from_pretrained` its arguments and puts the loaded model in order.
"""

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

from recondense.errors import UserError
from recondense.models.parameters import weights_bytes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """How the weights of a model that is no plain one lie on disk.

    Args:
        method: "mxfp4" or "fp8".
        num_bytes: of its safetensors files.
    """

    method: str
    num_bytes: int


def method_of(config: Mapping[str, Any]) -> str | None:
    """How a config.json says that the weights are stored: "mxfp4", "fp8" or what else; None if plainly."""
    stored = config.get("quantization_config")
    return str(stored.get("quant_method") or "a format without a name") if stored else None


def check(config: Mapping[str, Any]) -> list[str]:
    """Why the weights of a config.json cannot be read; empty if they can."""
    method = method_of(config)
    if method in (None, "mxfp4"):
        return []
    if method == "fp8":
        if config["quantization_config"].get("weight_block_size"):
            return []
        method = "fp8 without weight_block_size"
    return [
        f"its weights are stored in {method}, which is not read (mxfp4 and fp8 with weight_block_size are); use the "
        "model in bf16, fp16 or fp32, or dequantise it first with the tool that made it."
    ]


def weight_name(key: str, method: str | None) -> str:
    """The name of the weight that a stored tensor is, as it is called where weights are stored plainly."""
    return key.removesuffix("_blocks") if method == "mxfp4" else key


def missing_scales(key: str, dtype: str, method: str | None, keys: Collection[str]) -> list[str]:
    """The scales of a stored tensor, without which its numbers mean nothing, if the checkpoint lacks them.

    Args:
        dtype: as safetensors calls it.
        method: as `method_of`.
        keys: names of all tensors of the checkpoint.
    """
    names: list[str] = []
    if method == "mxfp4" and key.endswith("_blocks"):
        names = [f"{key.removesuffix('_blocks')}_scales"]
    elif method == "fp8" and dtype in ("F8_E4M3", "F8_E5M2"):  # transformers would take them for the weights
        stem = key.removesuffix("weight")
        names = [f"{key}_scale_inv", f"{stem}scale", f"{stem}qscale_weight"]
    return [] if any(name in keys for name in names) else names[:1]


@contextmanager
def dequantising(config: Mapping[str, Any], dtype: torch.dtype | str) -> Iterator[dict[str, Any]]:
    """Arguments with which `from_pretrained` reads the weights of a config as whole numbers, within the context.

    Args:
        config: config.json of a model.
        dtype: what the weights are loaded in; "auto" is the config's own, and bf16 where that has fewer bits.

    Yields:
        `dtype`, and `quantization_config` unless the weights are stored plainly.

    Raises:
        UserError: what `check` has against it.
    """
    if refused := check(config):
        raise UserError(refused[0])
    method = method_of(config)
    if method is None:
        yield {"dtype": dtype}
        return
    if isinstance(dtype, str):
        said = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
        dtype = {"float32": torch.float32, "float16": torch.float16}.get(said, torch.bfloat16)
    if method == "mxfp4":
        yield {"dtype": dtype, "quantization_config": Mxfp4Config(dequantize=True)}
        return
    how = FineGrainedFP8Config(**{**config["quantization_config"], "dequantize": True})
    with reading(config):
        yield {"dtype": dtype, "quantization_config": how}


@contextmanager
def reading(config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, transformers makes the weights of a config whole as they are stored."""
    if method_of(config) != "fp8":
        yield
        return
    own = Fp8Dequantize._dequantize_one
    Fp8Dequantize._dequantize_one = _by_blocks_of_the_config(own)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = own  # type: ignore[method-assign]


@torch.no_grad()
def settle(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a dequantised model one like any other: in one dtype, and saved as it is.

    transformers leaves what was never quantised in the file's dtype, and would write fewer bits again.

    Args:
        dtype: as it was asked for; fp32 tensors that transformers keeps stay fp32.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype not in (dtype, torch.float32):
            tensor.data = tensor.data.to(dtype)
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__["_weight_conversions"] = get_model_conversion_mapping(model)


def _by_blocks_of_the_config(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """transformers' way from FP8 to whole numbers, with blocks of the size that the config says.

    transformers 5.17 to 5.23 divide a weight evenly by its number of scales: wrong, or refused, where the last block is
    cut short (576 rows in blocks of 128: kv_a_proj_with_mqa of DeepSeek-V3).
    """

    def dequantize(
        op: Fp8Dequantize, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None
    ) -> Tensor:
        """W = q ⊙ (scale of its block): (…, O, I) from (…, O, I) and (…, ⌈O/o⌉, ⌈I/i⌉) in blocks of (o, i)."""
        rows, columns = quantized.shape[-2:]
        high, wide = op.hf_quantizer.quantization_config.weight_block_size
        fp8 = quantized.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        if not fp8 or scales.dtype == torch.uint8 or scales.shape[-2:] != (-(-rows // high), -(-columns // wide)):
            return own(op, quantized, scales, output_dtype=output_dtype)  # not what the config says of the others
        spread = scales.float().repeat_interleave(high, dim=-2).narrow(-2, 0, rows)
        spread = spread.repeat_interleave(wide, dim=-1).narrow(-1, 0, columns)
        return (quantized.float() * spread).to(output_dtype or torch.bfloat16)

    return dequantize


def stored(path: str | Path, revision: str | None = None) -> Stored | None:
    """How the weights of a model lie on disk; None if they are stored plainly, or their files cannot be found.

    Args:
        path: a folder, or a hub id that has been loaded: its files in the cache count.
    """
    config = _file(path, "config.json", revision)
    method = None if config is None else method_of(json.loads(config.read_text(encoding="utf-8")))
    num_bytes = None if method is None else bytes_on_disk(path, revision)
    return None if method is None or num_bytes is None else Stored(method, num_bytes)


def bytes_on_disk(path: str | Path, revision: str | None = None) -> int | None:
    """Bytes of the safetensors files that hold a model's weights.

    Args:
        path: a folder, or a hub id that has been loaded: its files in the cache count.

    Returns:
        None if they cannot be found.
    """
    index = _file(path, INDEX, revision)
    names = [SINGLE]
    if index is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files = [_file(path, name, revision) for name in names]
    found = [file.stat().st_size for file in files if file is not None]
    return sum(found) if len(found) == len(names) else None


def _file(path: str | Path, name: str, revision: str | None) -> Path | None:
    """A file of a model's, in its folder or in the hub's cache."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    cached = try_to_load_from_cache(str(path), name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


BytesOf = Callable[[nn.Module], int]
MXFP4_BITS = 4 + 8 / 32  # an exponent for every 32 numbers


def quantization(config: PretrainedConfig) -> dict[str, Any]:
    """How a checkpoint's weights are quantised; empty if they are not."""
    found = getattr(config, "quantization_config", None) or {}
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def stored_bytes(model: PreTrainedModel, quantized: Mapping[str, Any]) -> BytesOf:
    """How many bytes a part of a model takes in its checkpoint, as files have them.

    FP8 is one byte a number of every Linear layer but the head and of the experts, and a 4-byte scale a block; MXFP4
    is 4 bits a number of the experts' weights and a byte for every 32. All else is stored in its own type.

    Raises:
        UserError: another quantisation.
    """
    if not quantized:
        return weights_bytes
    method = quantized.get("quant_method")
    if method not in ("fp8", "mxfp4"):
        raise UserError(
            f"model.path: the checkpoint is quantised by {method}, whose bytes are not known here (fp8 and mxfp4 are); "
            "model.dtype=bfloat16 counts it dequantised"
        )
    head = model.get_output_embeddings()
    linear = {id(each.weight) for each in model.modules() if isinstance(each, nn.Linear) and each is not head}

    def of(part: nn.Module) -> int:
        size = weights_bytes(part)
        for parameter in part.parameters():
            stacked = parameter.ndim == 3  # the experts'
            if method == "mxfp4" and stacked:
                size += round(parameter.numel() * MXFP4_BITS / 8) - parameter.nbytes
            elif method == "fp8" and (stacked or id(parameter) in linear):
                size += _fp8_bytes(parameter, quantized.get("weight_block_size")) - parameter.nbytes
        return size

    return of


def _fp8_bytes(weight: torch.Tensor, block: Sequence[int] | None) -> int:
    """Without a block size, one scale a matrix."""
    *stack, rows, columns = weight.shape
    high, wide = block or (rows, columns)
    return weight.numel() + 4 * math.prod(stack) * -(-rows // high) * -(-columns // wide)
