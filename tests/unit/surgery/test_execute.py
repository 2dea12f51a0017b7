"""Surgery executes a plan: shapes from the plan alone, weights from the originals, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES, bits, condense_plan, logits, qwen2_moe, same_bits, windows
from torch import Tensor

from recondense.models import families, moe_blocks
from recondense.models.parameters import count_parameters
from recondense.models.replacement_blocks import CondensedMoE
from recondense.operations import Condense
from recondense.plan import Plan
from recondense.surgery import execute


def logits_by_hand(model: Any, plan: Plan, ids: Tensor) -> Tensor:
    """Logits of the original with hooks that replace the blocks' outputs by the plan's sums."""
    handles = []
    for operation in plan.operations:
        block = moe_blocks.get_block(model, operation.layer)

        def replace(block: Any, args: tuple[Tensor], output: Tensor, operation: Condense = operation) -> Tensor:
            x = args[0].flatten(0, 1)
            if hasattr(block, "shared_experts"):
                y = block.shared_experts(x)
            elif operation.shared_gate is None:
                y = block.shared_expert(x) * torch.sigmoid(block.shared_expert_gate(x))
            else:
                y = block.shared_expert(x) * operation.shared_gate
            for expert, weight in zip(operation.experts, operation.coefficients, strict=True):
                y = y + block.experts(x, torch.full((len(x), 1), expert), torch.full((len(x), 1), weight))
            return y.view_as(output)

        handles.append(block.register_forward_hook(replace))
    output = logits(model, ids)
    for handle in handles:
        handle.remove()
    return output


@pytest.mark.parametrize("gate", [0.4, None])
@pytest.mark.parametrize("experts", [(), (1, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_the_plan_says(family: str, experts: tuple[int, ...], gate: float | None) -> None:
    model, ids = FAMILIES[family](), windows(3, 12)
    original, before = logits(model, ids), bits(model)
    plan = condense_plan(model, [2, 1], experts, gate)
    expected = logits_by_hand(model, plan, ids)
    originals = execute.execute(model, plan)
    assert set(originals) == {1, 2} and set(moe_blocks.sparse_blocks(model)) == set(
        families.facts(model.config).moe_layers
    ) - {
        1,
        2,
    }
    actual = logits(model, ids)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert float((actual - original).abs().max()) > 0.1  # otherwise the test would show nothing
    after = bits(model)
    assert all(torch.equal(after[name], before[name]) for name in after if ".mlp." not in name)
    with moe_blocks.swap_blocks(model, originals):
        assert same_bits(bits(model), before)
        assert torch.equal(logits(model, ids), original)


@pytest.mark.parametrize("family", FAMILIES)
def test_restructure_on_the_meta_device_gives_the_same_shapes(family: str) -> None:
    """So a compressed checkpoint can be loaded from its plan alone."""
    model, ids = FAMILIES[family](), windows(2, 9)
    plan = condense_plan(model, [1, 2], (0, 3, 5), None)
    with torch.device("meta"):
        empty = FAMILIES[family]()
    execute.restructure(empty, plan)
    execute.execute(model, plan)
    assert all(value.is_meta for value in empty.parameters())
    shapes = [
        {name: (value.shape, value.dtype) for name, value in variant.state_dict().items()} for variant in (empty, model)
    ]
    assert shapes[0] == shapes[1]
    other = FAMILIES[family](seed=7)
    execute.restructure(other, plan)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_dropped_experts_are_removed() -> None:
    model = qwen2_moe()
    before = count_parameters(model)
    originals = execute.execute(model, condense_plan(model, [0, 1, 2], (2,)))
    lost = 3 * (5 * 3 * 32 * 16 + 6 * 32 + 32)  # five experts, the router, the shared gate
    assert count_parameters(model) == before - lost
    assert not any("gate.weight" in name or ".experts." in name for name in model.state_dict())
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert not pointers & {parameter.data_ptr() for block in originals.values() for parameter in block.parameters()}


def test_an_empty_plan_does_nothing() -> None:
    model = qwen2_moe()
    before = bits(model)
    assert execute.execute(model, Plan("tiny")) == {}
    assert same_bits(before, bits(model))


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ((Condense(1, (0,), (0.1,)), Condense(1, (2,), (0.1,))), r"condense, layer 1.*\[2\]"),
        ((Condense(0, (0,), (0.1,)),), r"condense, layer 0: the sparse MoE layers are \[1, 2\]"),
        ((Condense(3, (0,), (0.1,)),), "condense, layer 3"),
        (
            (Condense(2, (0, 6, 9), (0.1, 0.1, 0.1)),),
            r"the plan retains experts \[6, 9\], but the layer has 6 routed experts",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused(operations: tuple[Condense, ...], message: str) -> None:
    model = qwen2_moe(mlp_only_layers=[0])
    with pytest.raises(ValueError, match=message):
        execute.execute(model, Plan("tiny", operations))


def test_a_plan_that_does_not_fit_leaves_the_model_unchanged() -> None:
    """Its first operation fits, but the model must not be left half changed, with unfilled weights."""
    model, ids = qwen2_moe(), windows(2, 9)
    before = logits(model, ids)
    with pytest.raises(ValueError, match="condense, layer 9"):
        execute.execute(model, Plan("tiny", (Condense(1, (0,), (0.1,)), Condense(9, (0,), (0.1,)))))
    assert not any(isinstance(module, CondensedMoE) for module in model.modules())
    assert torch.equal(logits(model, ids), before)


def test_router_logits_are_off_once_nothing_routes() -> None:
    model, ids = qwen2_moe(output_router_logits=True), windows(2, 9)
    execute.execute(model, condense_plan(model, [0, 1, 2]))
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    assert output.aux_loss is None
