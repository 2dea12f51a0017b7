"""Forward passes up to the final norm, of a model in memory or one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense.models import decoder
from recondense.models.layer_store import layer_store
from recondense.models.tensor_store import TensorList

SHAPES = 8  # number of batch shapes whose masks and positions are kept


def model_inputs(model: PreTrainedModel, input_ids_BS: Tensor, position_ids_BS: Tensor | None) -> dict[str, Any]:
    """Return arguments for the model with which examples packed into one window do not attend to each other.

    Flash attention separates examples only within a single row, so the rows of a batch are joined into one; positions
    restart at 0 in each row. Other implementations separate examples in every row, if necessary with explicit masks.

    Args:
        model: the causal LM.
        input_ids_BS: token ids.
        position_ids_BS: positions, which restart at 0 for each example; None if nothing is packed.
    """
    if position_ids_BS is None:
        return {"input_ids": input_ids_BS}
    if "flash" in str(model.config._attn_implementation):
        return {"input_ids": input_ids_BS.reshape(1, -1), "position_ids": position_ids_BS.reshape(1, -1)}
    inputs: dict[str, Any] = {"input_ids": input_ids_BS, "position_ids": position_ids_BS}
    masks = decoder.packed_masks(model, input_ids_BS, position_ids_BS)
    if masks is not None:
        inputs["attention_mask"] = masks
    return inputs


def run(model: PreTrainedModel, arguments: Mapping[str, Any]) -> Any:
    """Run the model; the `logits` of its output are the hidden states after the final norm."""
    with decoder.bypass_head(model):
        return model(**arguments)


class LayerArguments:
    """The arguments of decoder layers except hidden states, such as masks and positions, cached by batch shape.

    Batches of equal shape have the same arguments if they contain only token ids. For other batches, the arguments are
    computed at every call.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._by_shape: dict[tuple[int, ...], list[dict[str, Any]]] = {}

    def enter(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the hidden states (B, S, D) that enter the first decoder layer.

        Args:
            batch: the arguments of the model.
        """
        return self._make(batch)[1]

    def get(self, layer: int, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of one decoder layer for a batch."""
        arguments = self._by_shape.get(tuple(batch["input_ids"].shape)) if _has_only_ids(batch) else None
        return (self._make(batch)[0] if arguments is None else arguments)[layer]

    def _make(self, batch: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Tensor]:
        arguments, entering_BSD = decoder.arguments_of_layers(self._model, batch)
        if _has_only_ids(batch):
            shape = tuple(batch["input_ids"].shape)
            if shape not in self._by_shape and len(self._by_shape) >= SHAPES:
                del self._by_shape[next(iter(self._by_shape))]
            self._by_shape[shape] = arguments
        return arguments, entering_BSD


def _has_only_ids(batch: Mapping[str, Any]) -> bool:
    return batch.keys() <= {"input_ids", "use_cache"}


def run_layer(model: PreTrainedModel, layer: int, hidden_BSD: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Run one decoder layer, loading its weights if necessary; (B, S, D) to (B, S, D)."""
    with layer_store(model).resident(layer):
        output = decoder.decoder_layers(model)[layer](hidden_BSD, **arguments)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def layer_by_layer(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], advance: Callable[[], None] = lambda: None
) -> TensorList:
    """Run some batches through the model one layer at a time, so that each layer's weights are read only once.

    Args:
        model: the causal LM.
        batches: the arguments of the model for each batch, including input_ids.
        advance: called after each decoder layer.

    Returns:
        The hidden states after the final norm (B, S, D), one tensor per batch.
    """
    storage, arguments = layer_store(model).tensor_storage(), LayerArguments(model)
    states = storage.tensor_list()
    for batch in batches:
        states.append(arguments.enter(batch))
    for layer in range(len(decoder.decoder_layers(model))):
        entering, states = states, storage.tensor_list()
        for batch, hidden_BSD in zip(batches, entering, strict=True):
            states.append(run_layer(model, layer, hidden_BSD, arguments.get(layer, batch)))
        advance()
    final = storage.tensor_list()
    for hidden_BSD in states:
        final.append(decoder.final_norm(model)(hidden_BSD))
    return final
