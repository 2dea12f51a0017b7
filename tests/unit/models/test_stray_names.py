"""Names that wrappers and adapters leave in a checkpoint, as they are saved by peft, torch.compile and others."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.small import byte_tokenizer
from support.tiny_models import qwen2_moe

import recondense as rc
from recondense.errors import UserError
from recondense.models.stray_names import adapter_names, additional_part

State = dict[str, Any]
# peft asks transformers by a name that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
MERGE = "holds a PEFT adapter that is not merged .*merge_and_unload"


def peft_state(model: Any, prefix: bool, **settings: Any) -> State:
    """The state dict of a model with LoRA, with or without the prefix of peft's model."""
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    wrapped = get_peft_model(model, config)
    return (wrapped if prefix else wrapped.base_model.model).state_dict()


def renamed(pattern: str, name: str) -> Callable[[State], State]:
    return lambda state: {re.sub(pattern, name, key): value for key, value in state.items()}


def with_leftover(state: State) -> State:
    name = "model.layers.0.self_attn.q_proj.lora_{}.weight"
    return {**state, name.format("A"): torch.zeros(4, 32), name.format("B"): torch.zeros(32, 4)}


STATES: dict[str, tuple[Callable[[State], State], str]] = {
    "saved from peft's model": (lambda _: peft_state(model(), True), MERGE),
    "saved from the model inside": (lambda _: peft_state(model(), False), MERGE),
    "with a trained head": (lambda _: peft_state(model(), True, modules_to_save=["lm_head"]), MERGE),
    "with DoRA": (lambda _: peft_state(model(), True, use_dora=True), MERGE),
    "wrapped names alone": (renamed(r"q_proj\.", "q_proj.base_layer."), MERGE),
    "a part of an adapter left over": (with_leftover, MERGE),
    "compiled": (renamed("^", "_orig_mod."), "additional prefix '_orig_mod.'"),
    "compiled layer by layer": (renamed(r"(layers\.\d+)\.", r"\1._orig_mod."), "additional part '_orig_mod'"),
    "wrapped by DDP": (renamed("^", "module."), "additional prefix 'module.'"),
    "layers wrapped by FSDP": (
        renamed(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module."),
        "additional part '_fsdp_wrapped_module'",
    ),
    "layers wrapped for checkpointing": (
        renamed(r"(layers\.\d+\.mlp)\.", r"\1._checkpoint_wrapped_module."),
        "additional part '_checkpoint_wrapped_module'",
    ),
}


def model() -> Any:
    return qwen2_moe(vocab_size=len(byte_tokenizer()), eos_token_id=0)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", STATES)
def test_a_checkpoint_with_stray_names_is_refused(kind: str, streamed: bool, tmp_path: Path) -> None:
    """In one sentence that says how it was saved and what to do, before a weight is read."""
    change, message = STATES[kind]
    folder = tmp_path / "model"
    model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    state = change(load_file(folder / "model.safetensors"))
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        rc.load(folder, offload_folder=tmp_path / "offloaded" if streamed else None)
    assert "download" not in str(error.value)


def test_an_adapter_in_a_subfolder_is_not_read(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model(), config).save_pretrained(tmp_path / "model" / "adapter")
    loaded, _ = rc.load(tmp_path / "model")
    assert adapter_names(loaded.state_dict()) == []


def test_names_of_models_are_not_those_of_adapters() -> None:
    """DeepSeek's latent attention has `lora` in its settings only, and Mixtral's experts are named w1 to w3."""
    assert adapter_names(["model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "model.layers.0.mlp.gate.weight"]) == []
    assert adapter_names(["a.lora_A.default.weight", "a.base_layer.bias"]) == [
        "a.lora_A.default.weight",
        "a.base_layer.bias",
    ]


@pytest.mark.parametrize(
    ("missing", "unexpected", "part"),
    [
        (["a.b.weight"], ["a.inner.b.weight"], "inner"),
        (["a.b.weight", "a.c.weight", "a.d.weight"], ["a.x.b.weight"], None),  # one of three
        (["layers.1.weight"], ["layers.1.0.weight"], None),  # a number is another layer
        (["a.weight"], [], None),
        ([], ["a.weight"], None),
    ],
)
def test_the_part_that_most_names_have(missing: list[str], unexpected: list[str], part: str | None) -> None:
    assert additional_part(missing, unexpected) == part
