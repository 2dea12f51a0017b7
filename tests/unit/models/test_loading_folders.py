"""Loading a folder and what is refused there, and the fingerprint of the weights of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import checkpoint, config
from support.tiny_models import VOCAB, condense_plan, logits, qwen2_moe, tiny, windows
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recondense.config.schema import ModelConfig
from recondense.errors import UserError
from recondense.export.write_folder import write_folder
from recondense.models import loading
from recondense.operations import Merge
from recondense.plan import Plan
from recondense.surgery import execute

IDS = windows(3, 11)
PAIRS = ((0, 3), (1,), (5, 2, 4)), ((0.5, 0.5), (1.0,), (0.25, 0.25, 0.5))


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0")


def test_an_exported_model_is_loaded_again(tmp_path: Path) -> None:
    model = qwen2_moe()
    plan = condense_plan(model, (2, 0))
    execute.execute(model, plan)
    model.config.output_router_logits = True
    write_folder(model, tokenizer(), plan, tmp_path / "out", "")
    again, words = loading.load(tmp_path / "out", ModelConfig(device="cpu", dtype="float32"))
    assert words("w5")["input_ids"] == [5]
    assert not again.training and again.config.output_router_logits is False
    assert again.config._experts_implementation == "grouped_mm"
    actual: Tensor = logits(again, IDS)
    torch.testing.assert_close(actual, logits(model, IDS), rtol=0, atol=1e-4)
    half, _ = loading.load(tmp_path / "out", ModelConfig(device="cpu", dtype="bfloat16", experts="eager"))
    assert half.dtype == torch.bfloat16 and half.config._experts_implementation == "eager"


def test_load_explains_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        loading.load("nobody/no-such-model", ModelConfig(device="cpu"))
    qwen2_moe().save_pretrained(tmp_path / "out")
    tokenizer().save_pretrained(tmp_path / "out")
    loading.load(tmp_path / "out", ModelConfig(device="cpu"))
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "pytorch_model.bin")  # pickles are never loaded
    with pytest.raises(ValueError, match=r"model.path=.*safetensors"):
        loading.load(tmp_path / "out", ModelConfig(device="cpu"))


def test_load_refuses_a_folder_without_tokenizer(tmp_path: Path) -> None:
    """transformers would construct a tokenizer with an empty vocabulary."""
    qwen2_moe().save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"model.path=.*tokenizer"):
        loading.load(tmp_path / "out", ModelConfig(device="cpu"))


def test_load_refuses_a_truncated_file(tmp_path: Path) -> None:
    """As after a download or a copy that stopped half-way."""
    qwen2_moe().save_pretrained(tmp_path / "out")
    tokenizer().save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"model\.path="):
        loading.load(tmp_path / "out", ModelConfig(device="cpu"))


def test_weights_fingerprint() -> None:
    """Equal for equal weights; another one if a bit, a name or a type differs."""
    model = qwen2_moe()
    fingerprint = loading.weights_fingerprint(model)
    assert fingerprint == loading.weights_fingerprint(qwen2_moe()) and len(fingerprint) == 16
    others = {loading.weights_fingerprint(qwen2_moe(seed=1)), loading.weights_fingerprint(qwen2_moe().bfloat16())}
    with torch.no_grad():
        weight = model.model.layers[1].mlp.experts.down_proj
        weight[5, 31, 15] = torch.nextafter(weight[5, 31, 15], torch.tensor(9.0))
    others.add(loading.weights_fingerprint(model))
    assert len(others | {fingerprint}) == 4


def test_weights_fingerprint_depends_on_buffers() -> None:
    """The correction bias of a router, and the table of merged experts."""
    fingerprints = set()
    for change in (0.0, 0.5):
        model = tiny("deepseek_v3")
        model.model.layers[1].mlp.gate.e_score_correction_bias += change
        fingerprints.add(loading.weights_fingerprint(model))
    for groups in (PAIRS, (((0, 3), (4,), (5, 2, 1)), PAIRS[1])):
        model = qwen2_moe()
        execute.execute(model, Plan("tiny", (Merge(1, *groups),)))
        table = model.model.layers[1].mlp.gate.table.clone()
        model = qwen2_moe()
        execute.execute(model, Plan("tiny", (Merge(1, *PAIRS),)))
        model.model.layers[1].mlp.gate.table.copy_(table)
        fingerprints.add(loading.weights_fingerprint(model))
    assert len(fingerprints) == 4


def test_values_of_a_config_that_change_the_form_of_outputs_are_ignored(tmp_path: Path) -> None:
    values: dict[str, object] = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    folder = checkpoint(tmp_path / "model", "qwen2_moe", config(**values))
    model, _ = loading.load(folder, ModelConfig(device="cpu", attention="sdpa"))
    output = model(torch.zeros(1, 4, dtype=torch.long))
    assert output.logits.shape == (1, 4, 300) and not output.hidden_states and not output.attentions
    streamed, _ = loading.load(folder, ModelConfig(device="cpu", attention="sdpa"), tmp_path / "pages")
    assert all(getattr(one.config, name) != values[name] for one in (model, streamed) for name in values)
