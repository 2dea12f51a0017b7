"""Constants in place of experts, against plain loops over tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from support.plain_moe import ROUTING, PlainMoE, Standing, block_of, run, tokens
from support.tiny_models import EVERY, bits, deepseek_v2, logits, qwen2_moe, recorded, same_bits, texts, windows
from torch import Tensor

from recondense.models import moe_blocks
from recondense.models.parameters import count_parameters, routed_parameters
from recondense.operations import Condense, Constant, Factorize, Merge, Operation, Prune
from recondense.plan import Plan
from recondense.surgery import execute

IDS = windows(3, 11)
RETAINED = (0, 2, 5)
LOW = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (2, 2, 2))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def constants_by_hand(model: Any, layer: int, plain: PlainMoE) -> dict[int, Tensor]:
    """Each expert's mean output over the tokens that select it, text by text and token by token, in fp64."""
    inputs: list[Tensor] = []
    handle = block_of(model, layer).register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    for text in texts():
        model(input_ids=torch.tensor([text]), use_cache=False)
    handle.remove()
    outputs: dict[int, list[Tensor]] = {expert: [] for expert in range(6)}
    for x_D in torch.cat(inputs).double():
        weights_E = plain.routing_weights(x_D[None])[0]
        for expert in weights_E.nonzero().flatten().tolist():
            outputs[expert].append(plain.expert(expert, x_D[None])[0])
    zero = torch.zeros(32, dtype=torch.float64)
    return {expert: torch.stack(values).mean(dim=0) if values else zero for expert, values in outputs.items()}


def with_constants(plain: PlainMoE, constants: dict[int, Tensor], x_TD: Tensor) -> Tensor:
    """Σ weight · (expert's output or its constant) + the shared experts' output, (T, D)."""
    weights_TE = plain.routing_weights(x_TD)
    output = plain.shared(x_TD)
    for token in range(len(x_TD)):
        for expert in weights_TE[token].nonzero().flatten().tolist():
            part = plain.expert(expert, x_TD[token : token + 1])[0] if expert in RETAINED else constants[expert]
            output[token] += weights_TE[token, expert] * part
    return output


@pytest.mark.parametrize("family", EVERY)
@torch.no_grad()
def test_a_constant_is_the_mean_output_and_is_weighted_by_the_router(family: str) -> None:
    """Every family, with the family's own router; the blocks, then the logits of the model."""
    student, other = EVERY[family](), EVERY[family]()
    layers = list(moe_blocks.sparse_blocks(student))
    total, routed = count_parameters(student), routed_parameters(student)
    operations = tuple(Constant(layer, RETAINED) for layer in layers)
    plains = {layer: PlainMoE(block_of(other, layer), ROUTING[family]) for layer in layers}
    constants = {layer: constants_by_hand(other, layer, plains[layer]) for layer in layers}
    pair = isinstance(block_of(other, layers[0])(torch.zeros(1, 1, 32)), tuple)
    for layer in layers:
        function = partial(with_constants, plains[layer], constants[layer])
        other.model.layers[layer].mlp = Standing(function, pair)
    expert = count_parameters(moe_blocks.sparse_blocks(student)[layers[0]].experts) // 6
    execute.execute(student, Plan("tiny", operations), lambda: recorded(student))
    for layer in layers:
        experts: Any = block_of(student, layer).experts
        expected_CD = torch.stack([constants[layer][e] for e in (1, 3, 4)])
        torch.testing.assert_close(experts.constants.double(), expected_CD, **CLOSE)
        expected = with_constants(plains[layer], constants[layer], tokens(2.0).double())
        torch.testing.assert_close(run(block_of(student, layer), tokens(2.0)).double(), expected, **CLOSE)
    torch.testing.assert_close(logits(student, IDS), logits(other, IDS), rtol=1e-3, atol=1e-3)
    saved = len(layers) * 3 * (expert - 32)  # the router keeps its rows
    assert (total - count_parameters(student), routed - routed_parameters(student)) == (saved, saved)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_every_implementation_gives_the_same_outputs_and_gradients(family: str) -> None:
    """Also if all tokens select only constants: then the weights of the experts get zeros."""
    model = EVERY[family]()
    execute.execute(model, Plan("tiny", (Constant(1, RETAINED),)), lambda: recorded(model))
    model.requires_grad_(True)
    block: Any = block_of(model, 1)
    x_TD = tokens(2.0)
    index_TK = torch.randint(0, 6, (len(x_TD), 2), generator=torch.Generator().manual_seed(0))
    for selected_TK in (index_TK, torch.full_like(index_TK, 4)):
        results = []
        for implementation in ("eager", "grouped_mm", "batched_mm"):
            model.set_experts_implementation(implementation)
            model.zero_grad()
            weights_TK = torch.full(index_TK.shape, 0.5, requires_grad=True)
            x = x_TD.clone().requires_grad_(True)
            y_TD = block.experts(x, selected_TK, weights_TK)
            y_TD.square().sum().backward()
            gradients = {name: value.grad for name, value in block.experts.named_parameters()}
            assert all(gradient is not None for gradient in gradients.values())
            results.append([y_TD.detach(), x.grad, weights_TK.grad, *gradients.values()])
        for result in results[1:]:
            for actual, expected in zip(result, results[0], strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    constant_D = block.experts.constants[1].detach()
    torch.testing.assert_close(y_TD.detach(), constant_D.expand_as(y_TD), rtol=1e-5, atol=1e-5)
    assert block.experts(x_TD[:0], index_TK[:0], weights_TK[:0]).shape == (0, 32)


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ((Constant(1, (0, 6)),), r"retains experts \[6\]"),
        ((Constant(1, tuple(range(6))),), "retains all 6 experts"),
        ((Merge(1, ((0, 1), (2, 3, 4, 5)), ((0.5, 0.5), (0.25,) * 4)), Constant(1, (0,))), "already merged"),
        ((Constant(1, RETAINED), Constant(1, (0,))), "already constants"),
        ((Constant(1, RETAINED), Prune(1, (0, 1))), "already constants"),
        ((Constant(1, RETAINED), Condense(1, (0,), (0.5,))), "already constants"),
        ((Constant(1, RETAINED), Factorize(1, LOW)), "already constants"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused(operations: tuple[Operation, ...], message: str) -> None:
    model = qwen2_moe()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        execute.execute(model, Plan("tiny", operations), lambda: recorded(model))
    assert same_bits(bits(model), before)


def test_constants_need_the_calibration_set_and_the_states_of_the_model_before_them() -> None:
    """A layer that is pruned before another gets constants changes the tape."""
    with pytest.raises(ValueError, match="plan: constant needs the calibration set"):
        execute.execute(qwen2_moe(), Plan("tiny", (Constant(1, RETAINED),)))
    model, other = deepseek_v2(), deepseek_v2()
    execute.execute(model, Plan("tiny", (Prune(1, (0, 1, 3)), Constant(2, RETAINED))), lambda: recorded(model))
    execute.execute(other, Plan("tiny", (Prune(1, (0, 1, 3)),)))
    expected = constants_by_hand(other, 2, PlainMoE(block_of(other, 2), ROUTING["deepseek_v2"]))
    actual: Any = block_of(model, 2)
    torch.testing.assert_close(actual.experts.constants[2].double(), expected[4], **CLOSE)
