"""The effect of dropping experts, by running transformers' MoE blocks with their logits at minus infinity."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recondense.models import decoder, moe_blocks


def without_experts(block: nn.Module, dropped: Collection[int]) -> nn.Module:
    """A copy of a block of transformers whose router gives some experts logits of minus infinity."""
    masked_block: Any = copy.deepcopy(block)
    linear = nn.functional.linear

    def forward(hidden: Tensor) -> Any:
        def masked(x: Tensor, weight: Tensor) -> Tensor:
            logits = linear(x, weight)
            logits[..., list(dropped)] = -torch.inf
            return logits

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.functional, "linear", masked)
            return type(masked_block.gate).forward(masked_block.gate, hidden)

    masked_block.gate.forward = forward
    return masked_block


@torch.no_grad()
def change(model: Any, tape: Any, layer: int, dropped: Collection[int]) -> float:
    """Frobenius norm of the change of the MoE layer's output over all real tokens, in fp64."""
    block = moe_blocks.get_block(model, layer)
    other = without_experts(block, dropped)
    total = 0.0
    for trace in tape.trace(model, layer):
        x = trace.x_TD[None]
        total += float((block(x) - other(x)).double().square().sum())
    return total**0.5


@contextmanager
def pruned(model: Any, dropped: Mapping[int, Collection[int]]) -> Iterator[None]:
    """Drop experts of a model within the context; the experts are given by layer."""
    blocks = {
        layer: without_experts(moe_blocks.get_block(model, layer), sets) for layer, sets in dropped.items() if sets
    }
    with moe_blocks.swap_blocks(model, blocks):
        yield


@torch.no_grad()
def loss_without(model: Any, texts: Sequence[Tensor], dropped: Mapping[int, Collection[int]]) -> float:
    """transformers' loss, averaged over all predicted tokens of all texts."""
    total, count = 0.0, 0
    with pruned(model, dropped):
        for ids in texts:
            total += float(model(input_ids=ids[None], labels=ids[None]).loss) * (len(ids) - 1)
            count += len(ids) - 1
    return total / count


@torch.no_grad()
def best_of_block(
    model: Any,
    texts: Sequence[Tensor],
    candidates: Mapping[int, Sequence[tuple[int, ...]]],
    layers: Sequence[int],
    before: Mapping[int, Collection[int]],
) -> tuple[int, ...]:
    """The best combination of the candidates of some layers, by running the whole model.

    Args:
        candidates: Sets of experts to drop, by layer.
        before: Experts of the layers below, which are dropped already.
    """

    def output_state(ids: Tensor) -> Tensor:
        """The output of the last of the layers, before any final norm."""
        outputs: list[Tensor] = []
        handle = decoder.decoder_layers(model)[layers[-1]].register_forward_hook(lambda *args: outputs.append(args[2]))
        decoder.decoder(model)(input_ids=ids[None], use_cache=False)
        handle.remove()
        return outputs[0][0].double()

    targets = [output_state(ids) for ids in texts]
    errors = {}
    for places in itertools.product(*(range(len(candidates[layer])) for layer in layers)):
        sets = {layer: candidates[layer][place] for layer, place in zip(layers, places, strict=True)}
        with pruned(model, {**before, **sets}):
            errors[places] = sum(
                float((output_state(ids) - target).square().sum()) for ids, target in zip(texts, targets, strict=True)
            )
    return min(errors, key=lambda places: (errors[places], places))
