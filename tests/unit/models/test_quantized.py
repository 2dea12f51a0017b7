"""Weights stored in MXFP4 and FP8: loaded weights equal those that a packer of the tests stored."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.packed import fp8_folder, mxfp4_folder, saved, write
from support.small import byte_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from recondense.config.schema import ModelConfig
from recondense.export.write_folder import write_folder
from recondense.models import decoder, loading, quantized
from recondense.models.layer_store import layer_store
from recondense.plan import Plan

SIZES: dict[str, Any] = {
    "vocab_size": 257, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts_per_tok": 2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def deepseek_v3() -> Any:
    """160, 144 and 24 are no multiples of a block's size; kv_a_proj_with_mqa has 152 rows: 128, and a partial block."""
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES, hidden_size=160, intermediate_size=300, moe_intermediate_size=144, n_routed_experts=4, n_group=1,
            topk_group=1, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=144,
            qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        )
    )  # fmt: skip


def qwen2_moe() -> Any:
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SIZES, hidden_size=160, intermediate_size=300, moe_intermediate_size=144, num_experts=4,
            shared_expert_intermediate_size=130,
        )
    )  # fmt: skip


def gpt_oss() -> Any:
    return GptOssForCausalLM(
        GptOssConfig(
            **SIZES, hidden_size=64, intermediate_size=96, num_local_experts=4, head_dim=16, sliding_window=8,
            pad_token_id=None,
        )
    )  # fmt: skip


FORMATS: dict[str, tuple[Callable[[], Any], Callable[[Path, Any], dict[str, Tensor]], str]] = {
    "deepseek_v3": (deepseek_v3, fp8_folder, "fp8"),
    "qwen2_moe": (qwen2_moe, fp8_folder, "fp8"),
    "gpt_oss": (gpt_oss, mxfp4_folder, "mxfp4"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_streamed_layers_equal_loaded_ones(tmp_path: Path, name: str) -> None:
    make, folder_of, _ = FORMATS[name]
    folder_of(tmp_path / "model", make())
    settings = ModelConfig(attention="eager", device="cpu")
    loaded, streamed = (loading.load(tmp_path / "model", settings, pages)[0] for pages in (None, tmp_path / "pages"))
    for layer, expected in enumerate(decoder.decoder_layers(loaded)):
        with layer_store(streamed).resident(layer):
            state = decoder.decoder_layers(streamed)[layer].state_dict()
            assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
    assert loading.weights_fingerprint(streamed) == loading.weights_fingerprint(loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_the_loaded_weights_are_those_of_the_files(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Key by key after saving again, which gives a plain checkpoint: not quantised, no quantization_config."""
    torch.manual_seed(0)
    make, folder_of, method = FORMATS[name]
    packed = folder_of(tmp_path, make())
    config = json.loads((tmp_path / "config.json").read_text())
    assert quantized.method_of(config) == method and quantized.check(config) == []
    with quantized.loading_arguments(config, dtype) as arguments:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True, **arguments)
    quantized.finish_dequantization(model, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert quantized.method_of(model.config.to_dict()) is None
    again = saved(model, tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert again.keys() == packed.keys()
    for key, value in again.items():
        expected = packed[key] if "correction" in key else packed[key].to(dtype)
        torch.testing.assert_close(value.float(), expected.float(), rtol=0, atol=0, msg=key)
    assert {buffer.dtype for name, buffer in model.named_buffers() if "correction" in name} <= {torch.float32}


def test_load_reports_dequantising_and_gives_a_plain_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """dtype=auto is the dtype of the config, and float32 is fp32. The export is a plain checkpoint."""
    torch.manual_seed(0)
    fp8_folder(tmp_path / "fp8", qwen2_moe())
    with caplog.at_level(logging.INFO, "recondense"):
        model, tokenizer = loading.load(tmp_path / "fp8", ModelConfig(device="cpu", dtype="auto"))
    assert model.dtype == torch.bfloat16
    assert [record.message for record in caplog.records if "dequantized" in record.message] == [
        f"{tmp_path / 'fp8'} is stored in fp8: dequantized to torch.bfloat16"
    ]
    in_fp32, _ = loading.load(tmp_path / "fp8", ModelConfig(device="cpu", dtype="float32"))
    assert {parameter.dtype for parameter in in_fp32.parameters()} == {torch.float32}
    with torch.no_grad():
        model(input_ids=torch.arange(12)[None])
    write_folder(model, tokenizer, Plan("tiny"), tmp_path / "out", "")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {str(file.get_slice(key).get_dtype()) for key in file.keys()} == {"BF16"}  # noqa: SIM118  # no mapping
    caplog.clear()
    again, _ = loading.load(tmp_path / "out", ModelConfig(device="cpu", dtype="auto"))
    assert not caplog.records
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("how", [{"quant_method": "awq", "bits": 4}, {"quant_method": "fp8"}, {"bits": 4}])
def test_other_formats_are_refused(tmp_path: Path, how: dict[str, Any]) -> None:
    tmp_path.joinpath("config.json").write_text(json.dumps({"model_type": "qwen2_moe", "quantization_config": how}))
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.path=.*stored in .*dequantize it first"):
        loading.load(tmp_path, ModelConfig(device="cpu"))


def test_bytes_on_disk(tmp_path: Path) -> None:
    """They are those of the files in the index: gpt-oss ships other copies of its weights beside them."""
    write(tmp_path, {"a": torch.zeros(1000, dtype=torch.uint8)}, PretrainedConfig(), {"quant_method": "mxfp4"})
    size = (tmp_path / "model.safetensors").stat().st_size
    save_file({"a": torch.zeros(5000)}, tmp_path / "original.safetensors")
    assert quantized.stored_weights(tmp_path) == quantized.StoredWeights("mxfp4", size)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "original.safetensors", "c": "original.safetensors"}})
    )
    both = size + (tmp_path / "original.safetensors").stat().st_size
    assert quantized.bytes_on_disk(tmp_path) == both
    (tmp_path / "original.safetensors").unlink()
    assert quantized.bytes_on_disk(tmp_path) is None and quantized.stored_weights(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    assert quantized.stored_weights(tmp_path) is None
    assert quantized.stored_weights("nobody/no-such-model") is None
