"""Passes of a training step up to the final norm: which tokens count, and what student and teacher compute once.

Shapes: B windows of a batch, S tokens of a window, T tokens that count, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense.data.labels import MASKED, next_labels
from recondense.models import decoder, views
from recondense.models.blocks import SkippedLayer
from recondense.models.hooks import input_of


class Counted(NamedTuple):
    """The tokens of a batch that count.

    Args:
        index_T: their positions in the flattened batch; None: all.
        labels_T: what each predicts; MASKED where nothing is known.
        num_labels: how many are known.
    """

    index_T: Tensor | None
    labels_T: Tensor
    num_labels: int

    @classmethod
    def of(cls, input_ids_BS: Tensor, labels_BS: Tensor | None, last: bool) -> Counted:
        """Those before a label that is not MASKED; without labels those before another token.

        Args:
            last: without labels, the last of each window as well: it predicts, though nothing follows it.
        """
        batch, length = input_ids_BS.shape
        next_BS = next_labels(input_ids_BS if labels_BS is None else labels_BS)
        if labels_BS is None and last:
            return cls(None, next_BS.flatten(), batch * (length - 1))
        index_T = (next_BS.flatten() != MASKED).nonzero().squeeze(-1)
        return cls(index_T, next_BS.flatten()[index_T], len(index_T))

    def __len__(self) -> int:
        return len(self.labels_T)

    def rows(self, states: Tensor) -> Tensor:
        """Those of (B, S, ...) or (1, B·S, ...) that count, (T, ...)."""
        flat = states.flatten(0, 1)
        return flat if self.index_T is None else flat[self.index_T.to(flat.device)]


def first_own_layer(model: PreTrainedModel, changed: set[int]) -> int:
    """The decoder layers below this one are the teacher's too, and nothing in them trains; 0: there are none.

    Args:
        changed: layers in which teacher and student differ.
    """
    if decoder.random_in_training(model.config):
        return 0
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    prefix = decoder.layers_prefix()
    if not all(name.startswith(prefix) for name in trained):
        return 0
    return min(changed | {int(name.removeprefix(prefix).partition(".")[0]) for name in trained}, default=0)


@contextmanager
def keeping(model: PreTrainedModel, layer: int) -> Iterator[list[Tensor]]:
    """The hidden states that enter a layer in the pass that runs inside; none for the first."""
    if layer == 0:
        yield []
        return
    with input_of(decoder.decoder_layers(model)[layer]) as states:
        yield states


@contextmanager
def differentiable(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Inside, what enters the lowest layer that trains requires a gradient, though nobody uses it.

    ZeRO-3 frees the weights of a leaf module before their gradients come where its input has none.
    """
    layers = enumerate(decoder.decoder_layers(model))
    lowest = next((module for _, module in layers if any(p.requires_grad for p in module.parameters())), None)
    if not wanted or lowest is None:
        yield
        return

    def require(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not torch.is_grad_enabled():
            return args, kwargs
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    handle = lowest.register_forward_pre_hook(require, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def starting(
    model: PreTrainedModel, layer: int, states: Sequence[Tensor], arguments: Mapping[str, Any]
) -> Iterator[Any]:
    """Arguments with which the model, inside, computes from the states that enter a layer; all of it for the first."""
    if not states:
        yield arguments
        return
    rest = {name: value for name, value in arguments.items() if name != "input_ids"}
    with views.swapped(model, {below: SkippedLayer() for below in range(layer)}):
        yield {**rest, "inputs_embeds": states[0]}
