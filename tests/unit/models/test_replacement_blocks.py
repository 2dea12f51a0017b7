"""A condensed layer against the sum that it replaces, computed from the original modules."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES, deepseek_v2, qwen2_moe
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from recondense.models import moe_blocks, replacement_blocks
from recondense.models.replacement_blocks import CondensedMoE, expert_outputs

EXPERTS: tuple[list[int], ...] = ([], [3], [5, 0, 2])
COEFFICIENTS = [0.37, 0.11, 0.74]


def tokens(num: int = 7, width: int = 32) -> Tensor:
    torch.manual_seed(9)
    return torch.randn(2, num, width)


def expected(block: Any, x: Tensor, experts: list[int], gate: float | None) -> Tensor:
    """gate · Shared(x) + Σ w_i E_i(x): every expert through transformers' module, alone and with weight 1."""
    flat = x.flatten(0, 1)
    if hasattr(block, "shared_experts"):
        y = block.shared_experts(flat)
    else:
        y = block.shared_expert(flat) * (torch.sigmoid(block.shared_expert_gate(flat)) if gate is None else gate)
    for expert, weight in zip(experts, COEFFICIENTS, strict=False):
        index = torch.full((flat.shape[0], 1), expert)
        y = y + weight * block.experts(flat, index, torch.ones(flat.shape[0], 1))
    return y.view_as(x)


def condense(model: Any, layer: int, experts: list[int], gate: float | None) -> CondensedMoE:
    weights = moe_blocks.sparse_blocks(model)[layer].weights
    shaped = CondensedMoE.make_empty(weights, len(experts), token_gate=gate is None)
    return shaped.fill(weights, experts, COEFFICIENTS[: len(experts)], gate)


CASES = [("qwen2_moe", 0.4), ("qwen2_moe", None), ("deepseek_v2", None)]


@torch.no_grad()
@pytest.mark.parametrize("experts", EXPERTS, ids=len)
@pytest.mark.parametrize(("family", "gate"), CASES)
def test_computes_the_weighted_sum(family: str, gate: float | None, experts: list[int]) -> None:
    model = FAMILIES[family]()
    block, x = moe_blocks.get_block(model, 2), tokens()
    layer = condense(model, 2, experts, gate)
    reference = expected(block, x, experts, gate)
    torch.testing.assert_close(layer(x), reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))
    assert layer(x[0, 0]).shape == (32,)  # any leading shape


@torch.no_grad()
@pytest.mark.parametrize("experts", EXPERTS, ids=len)
@pytest.mark.parametrize(("family", "gate"), CASES)
def test_folding_changes_nothing(family: str, gate: float | None, experts: list[int]) -> None:
    layer = condense(FAMILIES[family](), 2, experts, gate)
    x = tokens() / 4
    before = layer(x)
    layer.fold()
    assert layer.scale is None and not any("scale" in name for name in layer.state_dict())
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-6 * max(1.0, float(before.abs().max())))
    again = layer.down_proj.weight.clone()
    layer.fold()
    assert torch.equal(layer.down_proj.weight, again)


def test_fold_rounds_once_in_bf16() -> None:
    layer = condense(qwen2_moe().bfloat16(), 1, [4, 1], 0.3)
    down, scale = layer.down_proj.weight.double(), layer.scale
    assert scale is not None
    layer.fold()
    assert torch.equal(layer.down_proj.weight, (down * scale.double()).bfloat16())


@pytest.mark.parametrize("gate", [0.4, None])
def test_what_trains_and_what_does_not(gate: float | None) -> None:
    """The scale is a frozen buffer; gradients reach the three projections, and the gate only if it requires them."""
    layer = condense(qwen2_moe(), 2, [3, 1], gate)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    names = {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    assert {name for name, _ in layer.named_parameters()} == names | (
        {"shared_expert_gate.weight"} if gate is None else set()
    )
    assert [name for name, _ in layer.named_buffers()] == ["scale"]
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in names)
    layer(tokens()).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == (name in names)
    assert all(float(getattr(layer, name[:-7]).weight.grad.abs().min(dim=-1).values.max()) > 0 for name in names)
    assert layer.scale is not None and layer.scale.grad is None and not layer.scale.requires_grad


def test_the_scale_is_separate_from_the_weights() -> None:
    """The weights are those of the experts, so AdamW's steps are as large as in the original model."""
    model = qwen2_moe()
    block = moe_blocks.sparse_blocks(model)[2].weights
    layer = condense(model, 2, [3, 1], 0.4)
    assert block.shared is not None and layer.scale is not None
    assert torch.equal(layer.down_proj.weight[:, :24], block.shared[2])
    assert torch.equal(layer.down_proj.weight[:, 24:40], block.down_EDF[3])
    assert torch.equal(layer.gate_proj.weight[40:], block.gate_up_EHD[1][:16])
    assert torch.equal(layer.up_proj.weight[40:], block.gate_up_EHD[1][16:])
    torch.testing.assert_close(layer.scale, torch.tensor([0.4] * 24 + [0.37] * 16 + [0.11] * 16), rtol=1e-7, atol=0)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert not shared & {parameter.data_ptr() for parameter in layer.parameters()}


def test_bf16_keeps_the_scale_in_fp32() -> None:
    model = qwen2_moe().bfloat16()
    layer = condense(model, 2, [3, 1], 0.123456789)
    assert layer.scale is not None and layer.scale.dtype == torch.float32
    assert layer.scale[0].item() == pytest.approx(0.123456789, rel=1e-7)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        x = tokens().bfloat16()
        actual, reference = layer(x), expected_in_fp32(layer, x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), reference, rtol=0.03, atol=0.03 * float(reference.abs().max()))


def expected_in_fp32(layer: CondensedMoE, x: Tensor) -> Tensor:
    gate, up, down = (getattr(layer, name).weight.float() for name in ("gate_proj", "up_proj", "down_proj"))
    assert layer.scale is not None
    inner = nn.functional.silu(x.float() @ gate.T) * (x.float() @ up.T) * layer.scale
    return inner @ down.T


@pytest.mark.parametrize("gate", [0.4, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_on_the_meta_device(family: str, gate: float | None) -> None:
    real = condense(FAMILIES[family](), 2, [3, 1], gate)
    with torch.device("meta"):
        model = FAMILIES[family]()
    meta = CondensedMoE.make_empty(moe_blocks.sparse_blocks(model)[2].weights, 2, token_gate=gate is None)
    assert all(value.is_meta for value in meta.state_dict().values())
    assert {name: (value.shape, value.dtype) for name, value in meta.state_dict().items()} == {
        name: (value.shape, value.dtype) for name, value in real.state_dict().items()
    }


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_expert_outputs(family: str) -> None:
    """They equal those of transformers' module; an expert's bits do not depend on the other experts in the call."""
    model = FAMILIES[family]()
    block: Any = moe_blocks.get_block(model, 2)
    x_TD = tokens().flatten(0, 1)
    weights = moe_blocks.sparse_blocks(model)[2].weights
    outputs = expert_outputs(x_TD, weights, [4, 0, 5])
    for position, expert in enumerate([4, 0, 5]):
        output = block.experts(x_TD, torch.full((len(x_TD), 1), expert), torch.ones(len(x_TD), 1))
        torch.testing.assert_close(outputs[position], output, rtol=1e-5, atol=1e-5 * float(output.abs().max()))
        assert torch.equal(outputs[position], expert_outputs(x_TD, weights, [expert])[0])
    assert torch.equal(expert_outputs(x_TD, weights, list(range(6)))[[4, 0, 5]], outputs)
    assert expert_outputs(x_TD, weights, []).shape == (0, *x_TD.shape)


def test_imports_only_torch_and_the_standard_library() -> None:
    """The file is bundled into exports."""
    tree = ast.parse(Path(replacement_blocks.__file__).read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}


def test_no_shared_experts() -> None:
    """In a family without shared experts, a condensed layer consists of the retained experts."""
    weights = moe_blocks.sparse_blocks(deepseek_v2())[2].weights._replace(shared=None)
    layer = CondensedMoE.make_empty(weights, 2, token_gate=False).fill(weights, [1, 5], [0.5, 0.25], None)
    x_TD = tokens().flatten(0, 1)
    with torch.no_grad():
        one, five = expert_outputs(x_TD, weights, [1, 5])
        torch.testing.assert_close(layer(x_TD), 0.5 * one + 0.25 * five, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("token_gate", [False, True])
def test_the_input_of_the_down_projection_is_recomputed_in_backward(token_gate: bool) -> None:
    """The activation is not kept, and gradients equal those of autograd bit for bit."""
    torch.manual_seed(0)
    held: list[StorageWeakRef] = []

    def glu(gate: Tensor, up: Tensor) -> Tensor:
        activation = torch.nn.functional.silu(gate)
        held.append(StorageWeakRef(activation.untyped_storage()))
        return activation * up

    layer = CondensedMoE(8, 6, 10, glu, token_gate=token_gate)
    assert layer.scale is not None
    layer.scale.copy_(torch.rand(16))
    x = torch.randn(5, 8, requires_grad=True)
    y = layer(x)
    assert len(held) == 1 and held[0].expired()
    y.square().sum().backward()
    gradients = {name: value.grad for name, value in layer.named_parameters()} | {"x": x.grad}
    layer.zero_grad()
    x.grad = None
    inner = torch.nn.functional.silu(layer.gate_proj(x)) * layer.up_proj(x) * layer.scale
    if layer.shared_expert_gate is not None:
        gate = torch.sigmoid(layer.shared_expert_gate(x))
        inner = torch.cat((gate * inner[:, :6], inner[:, 6:]), dim=1)
    layer.down_proj(inner).square().sum().backward()
    expected = {name: value.grad for name, value in layer.named_parameters()} | {"x": x.grad}
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
