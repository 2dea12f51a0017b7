"""Sizes from shapes alone, against bytes of files, closed forms and models that were really compressed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import deepseek_v2, qwen2_moe, recorded
from torch import nn

from recondense.methods.cdmoe import CDMoE
from recondense.methods.decompose import Decompose
from recondense.methods.dropping import Dropping
from recondense.methods.merging import Merging
from recondense.methods.moei2 import InterExpertPruning
from recondense.methods.mone import MoNE
from recondense.methods.narrowing import Narrowing
from recondense.methods.saliency import SaliencyPruning
from recondense.methods.search.budget import Budget
from recondense.models import model_classes, moe_blocks
from recondense.models.parameters import weights_bytes
from recondense.models.published_configs import recorded_config
from recondense.models.quantized import byte_counter, quantization
from recondense.run.model_and_machine_checks import _check_order
from recondense.run.print_sizes import layer_table, ranges, weights_dtype
from recondense.run.search import search
from recondense.run.sizes import compare, outlined


def meta_model(make: Any = qwen2_moe, **changes: Any) -> Any:
    return model_classes.on_meta(make(**changes).config, torch.float32)


def published_model(hub_id: str) -> tuple[Any, dict[str, Any]]:
    config = recorded_config(hub_id)
    return model_classes.on_meta(config, torch.bfloat16), quantization(config)


def test_bytes_of_an_mxfp4_checkpoint_are_those_of_its_files() -> None:
    """`metadata.total_size` of gpt-oss-20b's model.safetensors.index.json."""
    model, quantized = published_model("openai/gpt-oss-20b")
    assert byte_counter(model, quantized)(model) == 13_761_264_768
    assert byte_counter(model, {})(model) == 2 * 20_914_757_184


def test_bytes_of_an_fp8_checkpoint() -> None:
    """By hand: a byte per number and 4 per block of 128 x 128, rounded up; embedding, head, norms, routers in bf16."""
    model, quantized = published_model("deepseek-ai/DeepSeek-V3-Base")
    attention = [(1536, 7168), (128 * 192, 1536), (576, 7168), (128 * 256, 512), (7168, 128 * 128)]
    dense, expert = [[(width, 7168), (width, 7168), (7168, width)] for width in (18432, 2048)]
    matrices = attention * 61 + dense * 3 + expert * 257 * 58
    expected = sum(rows * columns + 4 * -(-rows // 128) * -(-columns // 128) for rows, columns in matrices)
    norms = 61 * (2 * 7168 + 1536 + 512) + 7168
    expected += 2 * (2 * 129280 * 7168 + norms + 58 * 256 * 7168)
    correction = 4 * 58 * 256  # of the routers, in fp32
    assert expected <= byte_counter(model, quantized)(model) <= expected + correction


def test_another_quantization_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quantized with awq.*fp8 and mxfp4.*model\.dtype=bfloat16"):
        byte_counter(meta_model(), {"quant_method": "awq"})


def test_one_scale_per_matrix_without_a_block_size() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.LayerNorm(4))
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    bytes_of = byte_counter(model, {"quant_method": "fp8"})  # type: ignore[arg-type]
    assert bytes_of(model) == 24 + 4 + 2 * 4 * 4


def test_active_parameters_are_those_that_a_token_uses() -> None:
    model = meta_model()
    size = compare(model, []).before
    expert = 3 * 32 * 16
    assert size.total - size.active == 3 * (6 - 2) * expert
    compared = compare(model, [InterExpertPruning(prune_ratio=0.5), Decompose(average_rank=4)])
    factors = 3 * 4 * (32 + 16)
    assert compared.after.total - compared.after.active == 3 * (3 - 2) * factors
    condensed = compare(model, [CDMoE(num_experts=2)]).after
    assert condensed.active == condensed.total
    for ratio, retained in ((0.48, 3), (0.8, 1)):  # a token selects two
        constant = compare(model, [MoNE(budget=Budget(removed_expert_ratio=ratio))])
        assert {layer.experts_after for layer in constant.layers.values()} == {retained}
        weights, constants = min(2, retained), max(0, 2 - retained)
        outside = size.total - 3 * 6 * expert
        assert constant.after.active == outside + 3 * (weights * expert + constants * 32)


def test_narrow_condensed_layers_have_as_many_experts_as_others() -> None:
    layers = compare(meta_model(), [Narrowing(width=4), CDMoE(num_experts=3)]).layers.values()
    assert [layer.experts_after for layer in layers] == [3] * 3


def test_published_active_parameters() -> None:
    """As in the names or the model cards: 2.7 of 14.3 billion, and 2.4 of 15.7 billion without the embedding."""
    for hub_id, active in (("Qwen/Qwen1.5-MoE-A2.7B", 2.7), ("deepseek-ai/DeepSeek-V2-Lite", 2.7)):
        model, _ = published_model(hub_id)
        assert compare(model, []).before.active / 1e9 == pytest.approx(active, abs=0.05)


PRUNE_AND_DROP = [SaliencyPruning("random", budget=Budget(0.2)), Dropping("layer", Budget(0.4))]


def test_a_layer_that_is_changed_and_then_removed_comes_back() -> None:
    """Outlining and searching execute one step after another, and must undo them in reverse order."""
    model = meta_model()
    modules = list(model.modules())
    with outlined(model, PRUNE_AND_DROP) as operations:
        assert [operation.kind for operation in operations].count("drop") == 1
    assert list(model.modules()) == modules
    assert compare(model, PRUNE_AND_DROP) == compare(model, PRUNE_AND_DROP)
    searched = qwen2_moe()
    modules = list(searched.modules())
    plan = search(recorded(searched), [*PRUNE_AND_DROP, Narrowing("norms", width=8)])
    assert plan.operations[-1].kind == "narrow" and "drop" in {operation.kind for operation in plan.operations}
    assert list(searched.modules()) == modules


@pytest.mark.parametrize("make", [qwen2_moe, deepseek_v2])
def test_outlining_restores_the_model(make: Any) -> None:
    model = meta_model(make)
    modules, bytes_before = list(model.modules()), weights_bytes(model)
    with outlined(model, [CDMoE(num_experts=1, num_layers=1), Decompose(average_rank=3)]) as operations:
        assert {operation.kind for operation in operations} == {"condense", "factorize"}
        assert weights_bytes(model) < bytes_before
    assert list(model.modules()) == modules
    with (
        pytest.raises(ValueError, match="requires more"),
        outlined(
            model, [CDMoE(num_experts=1, num_layers=1), Dropping("moe", budget=Budget(removed_expert_ratio=0.999))]
        ),
    ):
        pass
    assert list(model.modules()) == modules


def test_outcomes_of_layers() -> None:
    model = meta_model(deepseek_v2)
    layers = compare(model, [CDMoE(num_experts=1, num_layers=[2]), Decompose(average_rank=3)]).layers
    assert [layers[layer].outcome for layer in range(3)] == ["", "factorized", "condensed"]
    assert [(layers[layer].experts_before, layers[layer].experts_after) for layer in range(3)] == [
        (None, None), (6, 6), (6, 1),
    ]  # fmt: skip
    assert layers[1].ranks == (3, 3) and layers[2].always_active
    for part, words in (("moe", "without its MoE block"), ("layer", "removed")):
        dropped = compare(model, [Dropping(part, budget=Budget(removed_expert_ratio=0.5))]).layers[1]  # type: ignore[arg-type]
        assert (dropped.outcome, dropped.experts_after) == (words, 0)
    assert dropped.bytes_after == 0
    merged = compare(model, [Merging("expert_outputs", budget=Budget(removed_expert_ratio=0.5))]).layers[1]
    assert (merged.outcome, merged.experts_after) == ("merged", 3)


def test_equal_layers_are_one_row() -> None:
    table = layer_table(compare(meta_model(), [CDMoE(num_experts=2, num_layers=2)]))
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [row[:4] for row in rows] == [
        ("0-1 (2)", "condensed", "6 -> 2 always active", ""), ("2 (1)", "unchanged", "6", ""),
    ]  # fmt: skip


def test_ranges() -> None:
    assert ranges([0, 2, 3, 4, 7]) == "0, 2-4, 7"


def test_dtype_of_the_weights() -> None:
    named: Any = SimpleNamespace(dtype=torch.bfloat16)
    assert weights_dtype(named, "auto") == torch.bfloat16
    assert weights_dtype(named, "float16") == torch.float16
    assert weights_dtype(SimpleNamespace(dtype=None), "auto") == torch.float32  # type: ignore[arg-type]


def test_budgets_that_cannot_be_met_are_refused() -> None:
    model = meta_model()
    assert moe_blocks.sparse_blocks(model)
    with pytest.raises(ValueError, match="budget requires"):
        compare(model, [CDMoE(num_experts=2, budget=Budget(memory_ratio=0.01))])


def test_narrow_layers_have_widths() -> None:
    sizes = compare(meta_model(), [Narrowing(width=8)])
    layers = sizes.layers
    assert "width" in [column.header for column in layer_table(sizes).columns]
    assert [(size.outcome, size.widths, size.experts_after) for size in layers.values()] == [
        ("narrowed", (8, 8), 6)
    ] * 3
    assert all(size.bytes_before - size.bytes_after == 6 * 8 * 3 * 32 * 4 for size in layers.values())


@pytest.mark.parametrize("allocation", ["layer", "global"])
@pytest.mark.parametrize("step", [CDMoE(1, budget=Budget(memory_ratio=0.5)), CDMoE(1, 1), Decompose(average_rank=4)])
def test_steps_that_need_one_width_come_before_uneven_narrowing(step: Any, allocation: str) -> None:
    """They are refused from the shapes; before the narrowing they are not."""
    narrowing = Narrowing(budget=Budget(memory_ratio=0.9), width_multiple=4, allocation=allocation)
    model = meta_model()
    with pytest.raises(ValueError, match=f"{type(step).__name__} needs one width; put the narrowing last"):
        compare(model, [narrowing, step])
    compare(model, [narrowing, Dropping("moe", budget=Budget(memory_ratio=0.7))])
    compare(model, [CDMoE(1, 1), narrowing])


def test_a_search_refuses_the_order_of_steps_before_the_first() -> None:
    """Also one whose shapes depend on the calibration set."""
    steps = [Narrowing(budget=Budget(memory_ratio=0.9), width_multiple=4, allocation="layer"), CDMoE(1, 1)]
    model = qwen2_moe()
    tape = SimpleNamespace(model=model)  # it has no states
    with pytest.raises(ValueError, match="CDMoE needs one width"):
        search(tape, steps)  # type: ignore[arg-type]


def test_a_run_refuses_the_order_of_steps_before_it_loads_weights() -> None:
    planned = qwen2_moe().config
    steps = [Narrowing(budget=Budget(memory_ratio=0.9), width_multiple=4, allocation="layer"), CDMoE(1, 1)]
    [problem] = _check_order(steps, planned)
    assert "CDMoE needs one width; put the narrowing last" in problem.text
    assert _check_order(steps[::-1], planned) == []
