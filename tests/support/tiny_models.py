"""Small random models and texts. Their weights are large, so that routing and divergences are not degenerate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.data.calibration_set import CalibrationSet
from recondense.models import model_classes
from recondense.models.tensor_store import Storage
from recondense.operations import Condense
from recondense.plan import Plan

VOCAB = 97
LENGTHS = (5, 17, 9, 20, 12)


def qwen2_moe(seed: int = 0, **changes: Any) -> Any:
    """Three sparse layers of six experts, top-2, a gated shared expert."""
    return tiny("qwen2_moe", seed, **changes)


# Settings of all families. Vocabulary, hidden size and widths differ, so that a transposed tensor is noticed.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
# A dense layer, then two sparse ones: six experts, top-2, two shared experts.
SHARED: dict[str, Any] = {
    "moe_intermediate_size": 16, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
UNSHARED: dict[str, Any] = {"intermediate_size": 16, "num_experts_per_tok": 2}

SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 16, "norm_topk_prob": True,
    },
    "deepseek": SHARED,
    "deepseek_v2": {**SHARED, **LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**SHARED, **LATENT, "q_lora_rank": 24, "norm_topk_prob": True},
    "mixtral": {**UNSHARED, "num_local_experts": 6},
    "olmoe": {**UNSHARED, "num_experts": 6},
    "gpt_oss": {
        **UNSHARED, "num_local_experts": 6, "head_dim": 16, "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    },
    "glm4_moe": {**SHARED, "head_dim": 16, "norm_topk_prob": True, "use_qk_norm": True},
    "ernie4_5_moe": {
        "moe_intermediate_size": 16, "moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1, "tie_word_embeddings": True,
    },
    "dots1": {**SHARED, "head_dim": 16, "norm_topk_prob": True},
    "solar_open": {**SHARED, "head_dim": 16, "norm_topk_prob": True},
    "glm4_moe_lite": {**SHARED, **LATENT, "q_lora_rank": 24, "norm_topk_prob": True},
    "mellum": {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 16},
}  # fmt: skip
NOT_OF_A_CONFIG = {"deepseek": ("n_group", "topk_group", "routed_scaling_factor")}


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of a family with three layers; tensors that start constant are random too."""
    torch.manual_seed(seed)
    settings = {**COMMON, **SETTINGS[family], **changes}
    settings = {name: value for name, value in settings.items() if name not in NOT_OF_A_CONFIG.get(family, ())}
    model_classes.register_model_type(family)
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if family == "gpt_oss" else "sdpa"
    ).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in model.state_dict().items():
        if name.endswith(CONSTANT):
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    model.set_experts_implementation("grouped_mm")  # as loading does
    return model


CONSTANT = ("e_score_correction_bias", "gate_up_proj_bias", "down_proj_bias", "router.bias")


def deepseek_v2(seed: int = 0, **changes: Any) -> Any:
    """A dense layer, then two sparse ones: six experts, top-2, weights × 1.5, two shared experts, latent attention."""
    return tiny("deepseek_v2", seed, **changes)


# Any: transformers wraps methods of its models in ways that type checkers do not follow.
EVERY: dict[str, Callable[..., Any]] = {family: partial(tiny, family) for family in SETTINGS}

# For tests that need no more than two families.
FAMILIES = {family: EVERY[family] for family in ("qwen2_moe", "deepseek_v2")}


def texts(seed: int = 0, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Random token ids, a list for each text."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def windows(num: int, length: int, seed: int = 0) -> Tensor:
    """Packed windows of random ids, (num, length)."""
    return torch.tensor(texts(seed, [length] * num))


def blocks(ids: list[list[int]], texts_per_block: int = 2) -> list[tuple[Tensor, Tensor]]:
    """The texts in the batches that `Tape.record` takes."""
    return list(CalibrationSet(ids).batches(texts_per_block))


def recorded(
    model: PreTrainedModel,
    ids: list[list[int]] | None = None,
    texts_per_block: int = 2,
    split: bool = False,
    storage: Storage | None = None,
) -> Tape:
    return Tape.record(model, blocks(texts() if ids is None else ids, texts_per_block), storage=storage, split=split)


def condense_plan(
    model: PreTrainedModel, layers: Iterable[int], experts: Sequence[int] = (1, 4), shared_gate: float | None = 0.4
) -> Plan:
    """A plan without a search; families without a shared gate get none."""
    gate = shared_gate if model.config.model_type == "qwen2_moe" else None
    coefficients = tuple(0.3 + 0.1 * position for position in range(len(experts)))
    return Plan("tiny", tuple(Condense(layer, tuple(experts), coefficients, gate) for layer in layers))


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the tensors of a module's state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Fail if the model's modules, weights, mode or hooks change within the context."""
    before, modules, training = bits(model), list(model.modules()), model.training
    yield
    assert same_bits(before, bits(model))
    assert modules == list(model.modules())
    assert training == model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@torch.no_grad()
def logits(model: nn.Module, input_ids_BS: Tensor) -> Tensor:
    """(B, S, V)"""
    logits_BSV: Tensor = model(input_ids=input_ids_BS, use_cache=False).logits
    return logits_BSV
