"""Forward passes up to the final norm, of a model in memory or layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense.models import decoder, streaming
from recondense.models.tensor_store import Shelf


def model_inputs(model: PreTrainedModel, input_ids_BS: Tensor, position_ids_BS: Tensor | None) -> dict[str, Any]:
    """What the model is called with, so that examples of one window are kept apart.

    Flash attention finds examples in a single row only: there the rows of a batch become one, for every row's positions
    begin at 0. Other kinds find them in every row. Models that do not look for them get their masks ready made.
    """
    if position_ids_BS is None:
        return {"input_ids": input_ids_BS}
    if "flash" in str(model.config._attn_implementation):
        return {"input_ids": input_ids_BS.reshape(1, -1), "position_ids": position_ids_BS.reshape(1, -1)}
    inputs: dict[str, Any] = {"input_ids": input_ids_BS, "position_ids": position_ids_BS}
    masks = decoder.masks_of_types(model, input_ids_BS, position_ids_BS)
    if masks is not None:
        inputs["attention_mask"] = masks
    return inputs


def run(model: PreTrainedModel, arguments: Mapping[str, Any]) -> Any:
    """The model's output, with hidden states after the final norm in place of logits."""
    with decoder.headless(model):
        return model(**arguments)


@torch.no_grad()
def layer_by_layer(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], advance: Callable[[], None] = lambda: None
) -> Shelf:
    """What `run` gives for some batches, each decoder layer's weights needed once; for models larger than memory.

    Args:
        batches: arguments of the model, input_ids among them.
        advance: called after each decoder layer.

    Returns:
        hidden states after the final norm (B, S, D), one a batch.
    """
    storage = streaming.storage(model)
    states = storage.shelf()
    for batch in batches:
        states.append(decoder.arguments_of_layers(model, batch)[1])
    for layer, module in enumerate(decoder.decoder_layers(model)):
        entering, states = states, storage.shelf()
        with streaming.resident(model, layer):
            for batch, hidden_BSD in zip(batches, entering, strict=True):
                output = module(hidden_BSD, **decoder.arguments_of_layers(model, batch)[0][layer])
                states.append(output[0] if isinstance(output, tuple) else output)
        advance()
    final = storage.shelf()
    for hidden_BSD in states:
        final.append(decoder.final_norm(model)(hidden_BSD))
    return final
