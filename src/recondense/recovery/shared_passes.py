"""Passes of a training step up to the final norm: which tokens count, and what student and teacher compute once.

Shapes: B windows of a batch, S tokens of a window, T tokens that count, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense.data.labels import MASKED, next_labels
from recondense.models import decoder, views
from recondense.models.forward import model_inputs, run
from recondense.models.hooks import capture_input, capture_outputs
from recondense.models.replacement_blocks import SkippedLayer


class CountedTokens(NamedTuple):
    """The tokens of a batch that count in a loss.

    Args:
        index_T: their positions in the flattened batch; None: all.
        labels_T: the label of each; MASKED where nothing is known.
        num_labels: the number of known labels.
    """

    index_T: Tensor | None
    labels_T: Tensor
    num_labels: int

    @classmethod
    def select(cls, input_ids_BS: Tensor, labels_BS: Tensor | None, last: bool) -> CountedTokens:
        """Tokens before a label that is not MASKED; without labels, tokens before another token.

        Args:
            last: without labels, the last token of each window counts too. It predicts, though nothing follows it.
        """
        batch, length = input_ids_BS.shape
        next_BS = next_labels(input_ids_BS if labels_BS is None else labels_BS)
        if labels_BS is None and last:
            return cls(None, next_BS.flatten(), batch * (length - 1))
        index_T = (next_BS.flatten() != MASKED).nonzero().squeeze(-1)
        return cls(index_T, next_BS.flatten()[index_T], len(index_T))

    def __len__(self) -> int:
        return len(self.labels_T)

    def select_rows(self, states: Tensor) -> Tensor:
        """The rows of (B, S, ...) or (1, B·S, ...) that count, (T, ...)."""
        flat = states.flatten(0, 1)
        return flat if self.index_T is None else flat[self.index_T.to(flat.device)]


@dataclass(frozen=True)
class PassInputs:
    """A batch as student and teacher get it.

    Args:
        arguments: of the model's forward.
        tokens: those that count.
        window_B: numbers of the windows, under which a teacher on disk keeps its predictions; None: not known.
    """

    arguments: Mapping[str, Any]
    tokens: CountedTokens
    window_B: Tensor | None = None

    @property
    def device(self) -> torch.device:
        ids: Tensor = self.arguments["input_ids"]
        return ids.device


def forward_arguments(
    model: PreTrainedModel, input_ids_BS: Tensor, position_ids_BS: Tensor | None, router_logits: bool = False
) -> dict[str, Any]:
    """Arguments of a forward pass in training.

    Args:
        position_ids_BS: begin at 0 with each example of a window; None: a window is one text.
        router_logits: the model hands out its routers' logits too.
    """
    arguments = {**model_inputs(model, input_ids_BS, position_ids_BS), "use_cache": False}
    return {**arguments, "output_router_logits": True} if router_logits else arguments


def first_unshared_layer(model: PreTrainedModel, changed: set[int]) -> int:
    """The lowest decoder layer that the student does not share with its original, or 0.

    Nothing below it trains, so both compute the same hidden states there.

    Args:
        changed: layers in which the two differ.
    """
    if decoder.is_random_in_training(model.config):
        return 0
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    prefix = decoder.layers_prefix()
    if not all(name.startswith(prefix) for name in trained):
        return 0
    return min(changed | {int(name.removeprefix(prefix).partition(".")[0]) for name in trained}, default=0)


def record_states(model: PreTrainedModel, layers: Sequence[int]) -> AbstractContextManager[list[Tensor]]:
    """A context that records hidden states (B, S, D) after some layers, after the final norm for the last layer.

    transformers' own `hidden_states` are the same, but lack those of removed layers.
    """
    if not layers:
        return nullcontext([])
    after = [*decoder.decoder_layers(model)[:-1], decoder.final_norm(model)]
    return capture_outputs([after[layer] for layer in layers])


@contextmanager
def record_entering(model: PreTrainedModel, layer: int) -> Iterator[list[Tensor]]:
    """The hidden states that enter a layer in the pass that runs inside; none for the first layer."""
    if layer == 0:
        yield []
        return
    with capture_input(decoder.decoder_layers(model)[layer]) as states:
        yield states


def run_from(
    model: PreTrainedModel,
    first: int,
    entering: Sequence[Tensor],
    arguments: Mapping[str, Any],
    layers: Sequence[int] = (),
) -> tuple[Any, Sequence[Tensor]]:
    """Run a model up to the final norm, beginning at a decoder layer.

    Args:
        first: the layer.
        entering: the hidden states that enter it; none: the model runs as a whole.
        arguments: of the whole model.
        layers: hidden states after these are recorded.

    Returns:
        The model's output with final hidden states as its logits, and the recorded states.
    """
    with record_states(model, layers) as states:
        if not entering:
            return run(model, arguments), states
        rest = {name: value for name, value in arguments.items() if name != "input_ids"}
        with views.swap_blocks(model, {below: SkippedLayer() for below in range(first)}):
            return run(model, {**rest, "inputs_embeds": entering[0]}), states


@contextmanager
def require_input_gradient(model: PreTrainedModel, needed: bool) -> Iterator[None]:
    """Inside, the input of the lowest layer that trains requires a gradient, though nothing uses it.

    ZeRO-3 frees the weights of a leaf module before their gradients come if its input has none.
    """
    layers = decoder.decoder_layers(model)
    lowest = next((layer for layer in layers if any(p.requires_grad for p in layer.parameters())), None)
    if not needed or lowest is None:
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
