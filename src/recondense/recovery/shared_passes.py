"""The forward passes of a training step up to the final norm, with the computation that student and teacher share.

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
from recondense.models import decoder, moe_blocks
from recondense.models.forward import model_inputs, run
from recondense.models.hooks import capture_input, capture_outputs
from recondense.models.removed_blocks import SkippedLayer


class CountedTokens(NamedTuple):
    """The tokens of a batch that count in a loss.

    Args:
        index_T: their positions in the flattened batch; None for all positions.
        labels_T: the label of each token; MASKED if it has none.
        num_labels: the number of tokens with a label.
    """

    index_T: Tensor | None
    labels_T: Tensor
    num_labels: int

    @classmethod
    def select(cls, input_ids_BS: Tensor, labels_BS: Tensor | None, last: bool) -> CountedTokens:
        """Select the tokens whose next label is not MASKED; without labels, the tokens that are followed by another.

        Args:
            input_ids_BS: token ids.
            labels_BS: labels; None if every token is the label of the one before it.
            last: without labels, also select the last token of each window. It has a prediction, but no label.
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
        """Return the rows (T, ...) of a tensor (B, S, ...) or (1, B·S, ...) that count."""
        flat = states.flatten(0, 1)
        return flat if self.index_T is None else flat[self.index_T.to(flat.device)]


@dataclass(frozen=True)
class PassInputs:
    """A batch for student and teacher.

    Args:
        arguments: the arguments of the model's forward pass.
        tokens: the tokens that count.
        window_B: the numbers of the windows, by which a teacher on disk finds its predictions; None if unknown.
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
    """Return the arguments of a forward pass in training.

    Args:
        model: the causal LM.
        input_ids_BS: token ids.
        position_ids_BS: positions, which restart at 0 for each example; None if a window is one text.
        router_logits: whether the model also returns its routers' logits.
    """
    arguments = {**model_inputs(model, input_ids_BS, position_ids_BS), "use_cache": False}
    return {**arguments, "output_router_logits": True} if router_logits else arguments


def first_unshared_layer(model: PreTrainedModel, changed: set[int]) -> int:
    """Return the first decoder layer that student and original do not share; 0 if no layer is shared.

    Below it nothing is trained, so both compute the same hidden states there.

    Args:
        model: the student's model.
        changed: the layers in which student and original differ.
    """
    if decoder.is_random_in_training(model.config):
        return 0
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    prefix = decoder.layers_prefix()
    if not all(name.startswith(prefix) for name in trained):
        return 0
    return min(changed | {int(name.removeprefix(prefix).partition(".")[0]) for name in trained}, default=0)


def record_states(model: PreTrainedModel, layers: Sequence[int]) -> AbstractContextManager[list[Tensor]]:
    """Return a context that records the hidden states (B, S, D) after some layers; for the last layer, after the norm.

    They are the same as transformers' own `hidden_states`, which lack those of removed layers.
    """
    if not layers:
        return nullcontext([])
    after = [*decoder.decoder_layers(model)[:-1], decoder.final_norm(model)]
    return capture_outputs([after[layer] for layer in layers])


@contextmanager
def record_entering(model: PreTrainedModel, layer: int) -> Iterator[list[Tensor]]:
    """Record the hidden states that enter a layer in the pass inside the context; none for the first layer."""
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
    """Run a model up to the final norm, starting at a decoder layer.

    Args:
        model: the causal LM.
        first: the layer to start at.
        entering: the hidden states that enter it; if empty, the entire model is run.
        arguments: the arguments of the model.
        layers: the layers after which hidden states are recorded.

    Returns:
        The model's output, whose `logits` are the final hidden states, and the recorded states.
    """
    with record_states(model, layers) as states:
        if not entering:
            return run(model, arguments), states
        rest = {name: value for name, value in arguments.items() if name != "input_ids"}
        with moe_blocks.swap_blocks(model, {below: SkippedLayer() for below in range(first)}):
            return run(model, {**rest, "inputs_embeds": entering[0]}), states


@contextmanager
def require_input_gradient(model: PreTrainedModel, needed: bool) -> Iterator[None]:
    """Make the input of the lowest trained layer require a gradient inside the context.

    Nothing uses this gradient. But without it, ZeRO-3 would free the weights of a leaf module before their gradients
    are computed.
    """
    layers = decoder.decoder_layers(model)
    lowest = next((layer for layer in layers if any(p.requires_grad for p in layer.parameters())), None)
    if not needed or lowest is None:
        yield
        return

    def require(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = args[0] if args else kwargs["hidden_states"]
        if not torch.is_grad_enabled() or states.requires_grad:  # the embedding trains
            return args, kwargs
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    handle = lowest.register_forward_pre_hook(require, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
