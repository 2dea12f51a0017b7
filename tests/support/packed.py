"""Folders with weights in FP8 and MXFP4 as published models have them, packed without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from support.small import byte_tokenizer

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by exponent (2 bits) and mantissa (1 bit); a fourth bit is the sign
BLOCK = 128


def pack_fp8(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Pack a matrix in e4m3 with an fp32 scale for each block of 128 x 128.

    Returns:
        the stored tensors, and the values that they stand for.
    """
    rows, columns = weight.shape
    scales = torch.zeros(-(-rows // BLOCK), -(-columns // BLOCK))
    stored, values = torch.zeros_like(weight, dtype=torch.float8_e4m3fn), torch.zeros_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scales[i, j] = (1 + i + 3 * j) * weight[block].abs().max() / 448
            stored[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            values[block] = stored[block].float() * scales[i, j]
    return {name: stored, f"{name}_scale_inv": scales}, values


def fp8_folder(folder: Path, model: Any) -> dict[str, Tensor]:
    """Write a folder as DeepSeek publishes it: every projection in FP8, all else in bf16.

    Returns:
        the values by key, fp32.
    """
    plain = saved(model, folder / "plain")
    stored, values = {}, {}
    for name, value in plain.items():
        if "_proj" in name and value.ndim == 2:
            packed, values[name] = pack_fp8(name, value)
            stored |= packed
        else:
            stored[name] = value if "correction" in name else value.bfloat16()
            values[name] = stored[name].float()
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    write(folder, stored, model.config, {**quantization, "weight_block_size": [BLOCK, BLOCK]})
    return values


def mxfp4_folder(folder: Path, model: Any) -> dict[str, Tensor]:
    """Write a folder as OpenAI publishes gpt-oss: experts in MXFP4, output rows first, and all else in bf16.

    Returns:
        the values by the model's own names, fp32.
    """
    generator = torch.Generator().manual_seed(4)
    stored, values = {}, {}
    for name, value in saved(model, folder / "plain").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            num_experts, inputs, outputs = value.shape
            shape = (num_experts, outputs, inputs // 32)
            code = torch.randint(16, (*shape, 32), generator=generator)
            exponent = torch.randint(118, 127, shape, generator=generator)
            stored[f"{name}_blocks"] = (code[..., 0::2] + 16 * code[..., 1::2]).to(torch.uint8)
            stored[f"{name}_scales"] = exponent.to(torch.uint8)
            sign = 1.0 - 2.0 * (code // 8)
            numbers = sign * torch.tensor(E2M1)[code % 8] * 2.0 ** (exponent[..., None] - 127)
            values[name] = numbers.reshape(num_experts, outputs, inputs).transpose(1, 2)
        else:
            stored[name] = value.bfloat16()
            values[name] = stored[name].float()
    write(folder, stored, model.config, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return values


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return tensors


def write(folder: Path, stored: dict[str, Tensor], config: PretrainedConfig, quantization: dict[str, Any]) -> None:
    save_file({name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors")
    settings = {**config.to_dict(), "dtype": "bfloat16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(settings))
    byte_tokenizer().save_pretrained(folder)
