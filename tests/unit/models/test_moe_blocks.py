"""Facts from configs agree with models; published sizes are counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import EVERY, FAMILIES, deepseek_v2, logits, qwen2_moe, unchanged, windows
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    GptOssConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
)

from recondense.models import decoder, families, moe_blocks
from recondense.models.parameters import count_parameters, sizes, weights_bytes
from recondense.operations import Condense, Prune
from recondense.plan import Plan
from recondense.surgery import execute

# The published configurations.
QWEN = Qwen2MoeConfig(
    vocab_size=151936, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16,
    num_key_value_heads=16, moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts=60,
    num_experts_per_tok=4, norm_topk_prob=False, tie_word_embeddings=False,
)  # fmt: skip
DEEPSEEK = DeepseekV2Config(
    vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=27, num_attention_heads=16,
    num_key_value_heads=16, moe_intermediate_size=1408, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2,
    first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
    v_head_dim=128, routed_scaling_factor=1.0, topk_method="greedy", norm_topk_prob=False, tie_word_embeddings=False,
)  # fmt: skip
PUBLISHED = {"qwen": (QWEN, 14_315_784_192, 12_457_082_880), "deepseek": (DEEPSEEK, 15_706_484_224, 14_394_851_328)}


def meta_model(config: PretrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    config, total, routed = PUBLISHED[name]
    facts, model = families.facts(config), meta_model(config)
    assert len(facts.moe_layers) * facts.num_experts * 3 * facts.hidden_size * facts.expert_width == routed
    assert sizes(model) == {"total": total, "routed_experts": routed}
    assert tuple(moe_blocks.sparse_blocks(model)) == facts.moe_layers


def test_published_facts() -> None:
    assert families.facts(QWEN) == families.Facts("qwen2_moe", 24, tuple(range(24)), 60, 4, 2048, 1408, 5632, True)
    assert families.facts(DEEPSEEK) == families.Facts(
        "deepseek_v2", 27, tuple(range(1, 27)), 64, 6, 2048, 1408, 2816, False
    )


@pytest.mark.parametrize(("num_experts", "memory_ratio"), [(4, 0.6954), (0, None)])
def test_memory_ratio_of_nine_condensed_layers(num_experts: int, memory_ratio: float | None) -> None:
    """By its shapes, a layer loses the router, its shared gate, and all experts that are not retained."""
    model = meta_model(QWEN)
    before = weights_bytes(model)
    retained = tuple(range(0, 2 * num_experts, 2))
    operations = [Condense(layer, retained, (0.1,) * num_experts, shared_gate=0.5) for layer in range(0, 18, 2)]
    execute.restructure(model, Plan("qwen", tuple(operations)))
    expert = 3 * 2048 * 1408
    lost = 9 * ((60 - num_experts) * expert + 60 * 2048 + 2048)
    assert count_parameters(model) == 14_315_784_192 - lost
    assert sizes(model)["routed_experts"] == 12_457_082_880 - 9 * (60 - num_experts) * expert
    scales = 9 * 4 * (5632 + num_experts * 1408)  # kept in fp32 while training
    assert weights_bytes(model) == before - 2 * lost + scales
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    if memory_ratio is not None:
        assert (14_315_784_192 - lost) / 14_315_784_192 == pytest.approx(memory_ratio, abs=5e-5)


VARIANTS: dict[str, Callable[[], Any]] = {
    "qwen": qwen2_moe,
    "qwen, some layers dense": lambda: qwen2_moe(num_hidden_layers=4, mlp_only_layers=[0, 2]),
    "qwen, every second layer sparse": lambda: qwen2_moe(num_hidden_layers=4, decoder_sparse_step=2),
    "deepseek": deepseek_v2,
    "deepseek, all sparse": lambda: deepseek_v2(first_k_dense_replace=0),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_facts_agree_with_the_modules(variant: str) -> None:
    model = VARIANTS[variant]()
    facts, blocks = families.facts(model.config), moe_blocks.sparse_blocks(model)
    assert facts.num_layers == len(decoder.decoder_layers(model))
    assert tuple(blocks) == facts.moe_layers
    for layer, block in blocks.items():
        assert block.layer == layer and block.module is moe_blocks.get_block(model, layer)
        weights = block.weights
        shape = (facts.num_experts, facts.hidden_size, facts.expert_width)
        assert block.num_experts == facts.num_experts
        assert weights.down_EDF.shape == shape
        assert weights.gate_up_EHD.shape == (facts.num_experts, 2 * facts.expert_width, facts.hidden_size)
        assert weights.shared is not None
        assert [tuple(weight.shape) for weight in weights.shared] == [
            (facts.shared_width, facts.hidden_size),
            (facts.shared_width, facts.hidden_size),
            (facts.hidden_size, facts.shared_width),
        ]
        assert (weights.shared_gate is not None) == facts.shared_gate
        pointers = {parameter.data_ptr() for parameter in block.module.parameters()}
        assert {tensor.data_ptr() for tensor in (weights.gate_up_EHD, weights.down_EDF, *weights.shared)} <= pointers


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_blocks_and_experts(family: str) -> None:
    """Prefixes are those of the state dict; neither router nor gate is among the experts."""
    model = FAMILIES[family]()
    layer = families.facts(model.config).moe_layers[-1]
    names = dict(model.named_modules())
    assert names[moe_blocks.block_name(layer)] is moe_blocks.get_block(model, layer)
    modules = moe_blocks.expert_modules(model, layer)
    assert all(names[f"{moe_blocks.block_name(layer)}.{name}"] is module for name, module in modules.items())
    numbers = sum(count_parameters(module) for module in modules.values())
    facts = families.facts(model.config)
    assert numbers == 3 * facts.hidden_size * (facts.num_experts * facts.expert_width + facts.shared_width)


def test_unsupported_models() -> None:
    with pytest.raises(ValueError, match=r"'llama' is not supported.*deepseek_v2, .*qwen2_moe"):
        families.facts(LlamaConfig())
    with pytest.raises(ValueError, match="has no MoE layers"):
        families.facts(Qwen2MoeConfig(num_hidden_layers=2, mlp_only_layers=[0, 1]))
    close: Any = PretrainedConfig()
    close.model_type = "qwen2_mo"
    with pytest.raises(ValueError, match="did you mean qwen2_moe"):
        families.family_of(close)


def test_lists_with_an_entry_per_layer_lose_those_of_dropped_layers() -> None:
    settings: dict[str, Any] = {"num_hidden_layers": 4, "eos_token_id": [1, 2, 3, 4]}
    config = Qwen2MoeConfig(**settings, mlp_only_layers=[3], mlp_layer_types=["sparse"] * 3 + ["dense"])
    assert families.stock_updates(config, {}, [0, 2], None) == {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
        "mlp_layer_types": ["sparse", "dense"],
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
    }


def test_kinds_of_attention_keep_the_places_that_a_config_gives_them() -> None:
    """Every other layer of gpt-oss has sliding attention, also in implementations that do not read layer_types."""
    config = GptOssConfig(num_hidden_layers=4)
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2
    expected = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    assert families.stock_updates(config, {}, [1, 2], None) == expected
    assert families.stock_updates(config, {}, [0, 2], None) is not None  # only one kind remains
    assert families.stock_updates(config, {}, [1], None) is None


@pytest.mark.parametrize("kind", [Qwen2MoeConfig, DeepseekV2Config])
def test_no_other_list_of_a_config_has_an_entry_per_layer(kind: type[PretrainedConfig]) -> None:
    """Lists with an entry per layer are known by name, and a new release of transformers may add one."""
    few, many = (kind(num_hidden_layers=number).to_dict() for number in (7, 11))
    grown = {name for name, value in many.items() if isinstance(value, list) and value != few[name]}
    assert grown <= set(families.PER_LAYER)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_blocks_are_restored_also_after_an_error(family: str) -> None:
    model, ids = FAMILIES[family](), windows(2, 7)
    layer = families.facts(model.config).moe_layers[0]

    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    before = logits(model, ids)
    with unchanged(model):
        with moe_blocks.swap_blocks(model, {layer: Nothing()}) as same:
            assert same is model
            assert not torch.equal(logits(model, ids), before)
        with pytest.raises(KeyError), moe_blocks.swap_blocks(model, {layer: Nothing()}):
            raise KeyError
        assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("family", EVERY)
def test_the_table_names_every_tensor_with_an_entry_per_expert(family: str) -> None:
    """There are seven experts, and no other size is seven."""
    model = EVERY[family](**{families.FAMILIES[family].num_experts: 7})
    for block in moe_blocks.sparse_blocks(model).values():
        for module, names in (
            (block.router, block.family.router_entries),
            (block.experts, block.family.expert_entries),
        ):
            assert {name for name, tensor in module.state_dict().items() if 7 in tensor.shape} == set(names)


def test_sizes_that_equal_the_number_of_experts_by_chance_are_not_pruned() -> None:
    """A norm in the router, and the experts themselves, are as wide as there are experts."""

    class Router(nn.Module):
        def __init__(self, before: Any) -> None:
            super().__init__()
            self.weight, self.num_experts, self.top_k = before.weight, before.num_experts, before.top_k
            self.norm, self.temperature = nn.LayerNorm(6), nn.Parameter(torch.ones(6))

    model = qwen2_moe(moe_intermediate_size=6)
    block = moe_blocks.sparse_blocks(model)[1]
    router: Any = Router(block.router)
    moe_blocks.set_block(model, 1, moe_blocks.replace_parts(block.module, router=router))
    execute.execute(model, Plan("tiny", (Prune(1, (0, 2, 5)),)))
    pruned = moe_blocks.sparse_blocks(model)[1]
    pruned_router: Any = pruned.router
    assert torch.equal(pruned_router.weight, router.weight[[0, 2, 5]]) and pruned_router.num_experts == 3
    assert torch.equal(pruned_router.norm.weight, router.norm.weight) and torch.equal(
        pruned_router.temperature, router.temperature
    )
    assert pruned.weights.gate_up_EHD.shape == (3, 12, 32) and pruned.weights.down_EDF.shape == (3, 32, 6)
    assert router.weight.shape == (6, 32) and router.num_experts == 6
